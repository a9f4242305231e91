"""A run's setting: the task, the domains and the models that a spec names."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from conservtl.adaptation.adaptation import Adaptation
from conservtl.adaptation.prepare import adapt
from conservtl.data import Data, Domains, first_batch
from conservtl.engine import Criterion, FitResult, Training, fit
from conservtl.engine.progress import show_plainly
from conservtl.experiments.run.earlier_run import check_preprocessing, earlier_run, model_as_saved
from conservtl.experiments.run.scoring import answered, in_order, on_source_head
from conservtl.experiments.run.setting_checks import (
    check_densest,
    check_headless,
    check_labels,
    check_source,
    check_validation,
)
from conservtl.experiments.run.source_labels import (
    check_outputs,
    check_reader,
    check_shots,
    classes_of,
    data_line,
    shots_note,
    with_source_labels,
)
from conservtl.experiments.spec.spec import Spec
from conservtl.layers import find_layers, matches, named_parameters
from conservtl.plan.plan import Plan
from conservtl.runtime.source_model import SourceHead
from conservtl.source.read import SourceLike, read_source
from conservtl.tasks.bad_files import skipped_text
from conservtl.tasks.base import Shift, Task

__all__ = ["TARGET_SEED", "Setting", "prepare"]

TARGET_SEED = 2**31
"""Beyond every seed that a spec can have."""


@dataclass(frozen=True)
class Setting:
    """The starting point of a run.

    Args:
        spec: the run's spec.
        domains: source and target.
        example: a small batch of inputs; finds the order of layers.
        shared: whether source and target have the same labels in the same order. One head then serves both.
        headless: whether the source's weights have no head, so that the source has no labels of its own.
        given: labels of the outputs of ``source.weights`` in their order; None: that of the domains.
    """

    spec: Spec
    domains: Domains
    example: Any
    shared: bool
    headless: bool = field(default=False, kw_only=True)
    given: tuple[str, ...] | None = field(default=None, kw_only=True)

    @cached_property
    def task(self) -> Task:
        """The spec's task, with the names of the outputs."""
        return self.spec.problem.within(self.domains.labels, self.domains.preprocessing)

    @cached_property
    def source_task(self) -> Task:
        """The spec's task, with the names of the source model's outputs."""
        return self.spec.problem.within(self.domains.source_labels, self.domains.preprocessing)

    @property
    def target(self) -> str:
        """The target's name in a report."""
        return self.task.target_name(self.spec.data, self.domains)

    @property
    def taken(self) -> dict[str, int] | None:
        """Name of each class -> number of examples to adapt with, those to validate on included; None: not known."""
        labels, parts = self.domains.labels, [self.domains.shots, self.domains.validation]
        found = [classes for part in parts if (classes := classes_of(part)) is not None]
        if not self.task.has_classes or len(found) < sum(part is not None for part in parts):
            return None
        classes = torch.cat(found)
        counts = classes[classes >= 0].bincount(minlength=len(labels)).tolist()
        return dict(zip(labels, counts, strict=True))

    @property
    def data_notes(self) -> tuple[str, ...]:
        """Lines on the data: classes and numbers of examples, files that are left out; none if a program holds it."""
        if self.spec.held is not None:
            return ()
        counted = bool(self.domains.sizes.get("unlabelled"))  # by the task, which says so
        line = () if counted else (data_line(self.task, self.domains, self.spec.data),)
        return (*line, *self.domains.notes)

    @property
    def shift(self) -> Shift:
        """How the target differs from the source."""
        return self.task.shift if self.shared else "labels"

    def without_source_head(self) -> Setting:
        """Return the setting of a source without a head: it answers nothing, and no test part of it is scored.

        Source data with the target's labels stay, to train on.
        """
        domains = self.domains
        train = domains.source_train if domains.source_labels == domains.labels else None
        bare = replace(domains, source_labels=(), source_train=train, source_test=None)
        return replace(self, domains=bare, shared=False, headless=True)

    def completed(self, source: nn.Module) -> Setting:
        """Return the setting with what only the source model can add to the domains."""
        spec = self.spec
        return replace(self, domains=self.task.completed(spec.data, self.domains, source, seed=spec.seed))

    def model(self, outputs: int, *, target: bool = False) -> nn.Module:
        """Return a model initialised by the spec's seed.

        Initial values of the ``target``, the one to adapt, differ from the source model's, whose body was trained under
        the very head it began with.
        """
        with torch.random.fork_rng():
            torch.manual_seed(self.spec.seed + TARGET_SEED * target)
            model = self.task.build(self.spec.model, self.domains.preprocessing, outputs)
        check_outputs(self.task, model, self.example, outputs)
        return model

    def adaptation(self, source: SourceLike) -> Adaptation:
        """Apply the spec's strategies to a model for the target, from this source."""
        model, spec = self.model(len(self.domains.labels), target=True), self.spec
        fresh = self.declared_fresh
        labels = (self.domains.labels, self.domains.source_labels)
        overlap = not self.shared and self.task.by_label and bool({*labels[0]} & {*labels[1]})
        if not self.shared and not overlap:
            reason = "the source has no head" if self.headless else "its labels differ from the source's"
            fresh |= dict.fromkeys(self.head(model), reason)
        if notes := self.data_notes:
            read = read_source(source)
            source = replace(read, notes=(*read.notes, *(f"data: {note}" for note in notes)))  # the plan shows them
        with torch.random.fork_rng():
            torch.manual_seed(spec.seed)
            chosen = labels if overlap else None
            adaptation = adapt(model, source, spec.strategies, fresh=fresh, labels=chosen, **self.adapt_options)
        if self.domains.proxies is not None and any(term.source for term in adaptation.plan.terms):
            adaptation.bound.plan = adaptation.plan.with_proxies(True)
        if self.headless:
            check_headless(spec, adaptation.plan)
        if not self.shared:
            check_reader(self.task, adaptation.model, adaptation.plan)
        return adaptation

    def scratch(self) -> Adaptation:
        """Return an adaptation that takes nothing from the source: every parameter is fresh, drawn by the seed."""
        model = self.random_model()
        with torch.random.fork_rng():
            torch.manual_seed(self.spec.seed)
            return adapt(model, model, fresh={"*": "from scratch"}, **self.adapt_options)

    def random_model(self) -> nn.Module:
        """Return a model for the target without pretrained values."""
        return self.model(len(self.domains.labels), target=True)

    @property
    def declared_fresh(self) -> dict[str, str]:
        """Globs of what does not start from the source although it fits -> the reason."""
        globs = (self.spec.fresh,) if isinstance(self.spec.fresh, str) else self.spec.fresh
        return dict.fromkeys(globs, "declared fresh by the spec")

    @property
    def adapt_options(self) -> dict[str, Any]:
        """Arguments of ``adapt`` that say what layers and head are."""
        return {"example": self.example, "layers": self.spec.layers, "head": self.head_globs}

    def fit(
        self, adaptation: Adaptation, train: Any, valid: Any = None, training: Training | None = None, **options: Any
    ) -> FitResult:
        """Train with the task's functions, the spec's seed and the domains' augmentation and source data.

        ``training`` takes the place of the spec's settings, and further arguments of ``fit`` win over those of the
        setting. Settings without ``select`` select on the task's headline metric.

        Raises:
            SpecError: a validation score decides something, and ``data.validation`` of the shots leaves no example; or
                no example has a label, and nothing in the plan learns without.
        """
        settings = self.selecting(training or self.spec.training)
        if valid is None and train is self.domains.shots:
            check_validation(self.spec.data, self.domains, settings, adaptation.plan)
        check_labels(train, adaptation.plan)
        check_densest(self.task, adaptation.model, train)
        if options.get("progress"):
            options["progress"] = self.show_metric
        sets = {name: answered(self.task, options[name]) for name in ("watch", "path") if name in options}
        given = self.fit_arguments(adaptation.plan) | options | sets
        return fit(adaptation, train, answered(self.task, valid), settings, **given)

    def show_metric(self, metric: str, value: float) -> str:
        """Return a metric for the progress bar, the task's headline one as the task writes it."""
        headline = self.task.headline
        return f"{headline.label} {headline.show(value)}" if metric == headline.metric else show_plainly(metric, value)

    def selecting(self, training: Training) -> Training:
        """Return settings that select on the task's headline metric, unless they name a metric themselves."""
        if training.select is not None:
            return training
        headline = self.task.headline
        select = Criterion(metric=headline.metric, direction=headline.better)
        return training.model_copy(update={"select": select})

    def fit_arguments(self, plan: Plan) -> dict[str, Any]:
        """Return the arguments of ``fit`` that follow from task, domains and seed; no proxies if nothing compares."""
        return {
            "forward": self.task.forward,
            "loss": self.task.loss,
            "metrics": self.task.metrics,
            "augment": self.task.augmented(self.domains.augmentation),
            "proxies": self.task.augmented(self.domains.proxies if plan.proxies else None),
            "source": None if self.headless else self.domains.source_train,
            "seed": self.spec.seed,
        }

    @property
    def head_globs(self) -> tuple[str, ...] | None:
        """Globs of the head in the spec's ``model`` section; None if it has none."""
        return getattr(self.spec.model, "head", None)

    def head(self, model: nn.Module) -> tuple[str, ...]:
        """Return the names of the head's parameters."""
        return self._drawn(model).head

    def _drawn(self, model: nn.Module) -> Plan:
        layers = self.spec.layers
        names = [name for name in named_parameters(model) if name.startswith("input_transform.")]
        if layers is not None and not all(any(matches(glob, name) for glob in layers) for name in names):
            layers = ("input_transform", *layers)  # added by an earlier run, so that no glob of the spec matches it
        return Plan.draw(find_layers(model, self.example, layers, self.head_globs), {}, {})

    def source_set(self, data: Data, source: nn.Module) -> Any:
        """Return a set of the source's as adapted models are scored on it.

        A model whose labels include all of the source's answers itself, with the outputs of the source's labels first.
        Else the source's own head answers, in the place of the model's.
        """
        if self.shared:
            return data
        labels, own = self.domains.labels, self.domains.source_labels
        if self.task.by_label and set(own) <= set(labels):
            order = [labels.index(label) for label in own] + [n for n, label in enumerate(labels) if label not in own]
            return in_order(self.source_task, data, order)
        return on_source_head(self.source_task, data, SourceHead(source, self._drawn(source).head_module))


def prepare(spec: Spec) -> Setting:
    """Read the data that a spec names.

    Raises:
        DataError: it is missing, or contradicts the spec.
        SpecError: neither weights nor source data are given.
    """
    if spec.held is not None:
        found: Setting = spec.held.setting(spec)
        return found
    check_source(spec)
    spec = spec.model_copy(update={"source": spec.source.pinned()})
    task = spec.problem
    data, model, weights, header = spec.data, spec.model, spec.source.weights, earlier_run(spec)
    if header is not None:
        data, model = task.adopt(data, header["preprocessing"]), model_as_saved(spec, header)
    elif weights is not None:
        data, model = task.beside(data, weights), task.architecture(model, weights)
    if data is not spec.data or model is not spec.model:
        spec = spec.model_copy(update={"data": data, "model": model})
    given, labels = task.outputs(spec.data, spec.source.labels) if header is None else (None, None)
    domains = task.load(spec.data, spec.model, seed=spec.seed, source=spec.source.data is not None)
    if header is not None:
        check_preprocessing(spec, header, domains.preprocessing)
        field = "the labels of the run that saved source.weights"
        fix = "Leave the source's data out (source.data: null), or give data with that run's labels."
        domains = with_source_labels(task, domains, header["labels"], trains=False, field=field, fix=fix)
    elif labels is not None:
        trains = spec.source.weights is None
        fix = "List the labels of the source model's outputs in their order, or restrict the data to them."
        domains = with_source_labels(task, domains, labels, trains=trains, field="source.labels", fix=fix)
    check_shots(task, domains)
    example = task.inputs(first_batch(domains.shots, 2))
    setting = Setting(spec, domains, example, domains.labels == domains.source_labels, given=given)
    note = shots_note(task, domains, setting.taken, spec.data.shots) + (
        (skipped_text(domains.skipped),) if domains.skipped else ()
    )
    return replace(setting, domains=replace(domains, notes=(*domains.notes, *note))) if note else setting
