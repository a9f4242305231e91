"""A problem that a program holds: how models are made, the source, the data and the functions; checked once."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from conservtl.adaptation.prepare import adapt
from conservtl.data import first_batch
from conservtl.engine import Training
from conservtl.engine.evaluation import Functions
from conservtl.engine.randomness import preserve_rng
from conservtl.errors import SourceError, SpecError
from conservtl.experiments.own.data import SET_NAMES, sets_of
from conservtl.experiments.own.fingerprint import fingerprint
from conservtl.experiments.own.first_look import (
    declared,
    headline,
    labels_for,
    outputs_of,
    read_given,
    source_model,
    tried,
    try_sets,
)
from conservtl.experiments.own.maker import Maker
from conservtl.experiments.own.options import ModelLike, ProblemOptions, check_options
from conservtl.experiments.own.sending import read_sent, sent
from conservtl.experiments.own.setting import OwnSetting
from conservtl.experiments.own.settings import OwnData, OwnModel, OwnSpec
from conservtl.experiments.own.task import OwnSets, OwnTask
from conservtl.experiments.run.source_labels import check_shots
from conservtl.experiments.run.source_training import SourceModel
from conservtl.experiments.spec.sections import SourceSection
from conservtl.experiments.spec.spec import Held
from conservtl.functions import accuracy, cross_entropy, inputs_of, labels_of
from conservtl.functions import forward as plain_forward
from conservtl.layers import unwrap
from conservtl.layers.copying import deep_copy
from conservtl.source.itself import Itself, check_own
from conservtl.source.read import SourceLike

__all__ = ["OwnProblem", "hold", "settings_of"]

_NUMBERS = itertools.count(1)
_SEEDS = 2**31
_BATCH = 2  # examples that models are tried on


@dataclass(frozen=True, eq=False)
class OwnProblem:
    """A problem that a program holds.

    Args:
        number: of the problem in this process.
        filled: whether the models that ``task.make`` returns may hold trained values.
        task: functions and data, and how models are made.
        start: the source model and the source as it was read.
        fresh: globs of parameters or layers that do not start from the source -> reason.
        headless: parameters of the head that the source lacks -> reason.
        allow: as for ``adapt``.
        example: inputs that find the order of layers.
        optimizer: as for ``fit``.
        file: path and digest of the file that workers read it from; None: it is pickled itself.
    """

    number: int
    filled: bool
    task: OwnTask
    start: SourceModel
    fresh: Mapping[str, str]
    headless: Mapping[str, str]
    allow: tuple[str, ...]
    example: Any
    optimizer: Any
    file: tuple[str, str] | None = None

    def setting(self, spec: Any) -> OwnSetting:
        """Return the setting of a run.

        Raises:
            DataError: a class has fewer examples than shots.
        """
        domains = self.task.load(spec.data, spec.model, seed=spec.seed, source=spec.source.data is not None)
        return OwnSetting(spec, domains, self.example, domains.labels == domains.source_labels, self)

    def source(self) -> SourceModel:
        """Return the source model."""
        return self.start

    def sent(self, folder: Path) -> AbstractContextManager[Held]:
        """Return the problem for workers that see a folder."""
        return sent(self, folder)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return super().__reduce_ex__(protocol) if self.file is None else (read_sent, self.file)


def settings_of(
    problem: OwnProblem,
    training: Training | None,
    *,
    seed: int,
    stored: bool = False,
    options: ProblemOptions,
) -> OwnSpec:
    """Return the settings of runs of a problem; results that are kept are found again by its content."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < _SEEDS:
        raise SpecError(f"seed must be a whole number, 0 to {_SEEDS - 1}; received {seed!r:.60}. Give one.")
    valid, layers, head = options.get("valid"), options.get("layers"), options.get("head")
    shots = options.get("shots")
    return OwnSpec(
        model=OwnModel(
            number=0 if stored else problem.number,
            content=fingerprint(problem) if stored else "",
            head=None if head is None else tuple(head),
        ),
        data=OwnData(
            target=next(iter(problem.task.sets.train)),
            shots="all" if shots is None else shots,
            validation=float(valid) if isinstance(valid, (int, float)) else 0.0,
        ),
        source=SourceSection(data=None if problem.task.sets.source_train is None else "auto"),
        layers=None if layers is None else tuple(layers),
        training=training or Training(),
        seed=seed,
    ).holding(problem)


def hold(
    model: ModelLike,
    source: SourceLike | Itself,
    train: Any,
    held_out: Mapping[str, Any] | None,
    training: Training | None,
    options: ProblemOptions,
) -> OwnProblem:
    """Return what a program hands over as a problem; everything is tried once, and nothing of it is changed.

    Data of the target is labelled examples, or target -> examples; ``training`` names the metric to judge by.

    Raises:
        InputError: one of its kinds; the message says what to change.
    """
    check_options(training, options)
    sets, tests = sets_of(train, held_out, options)
    functions = Functions(
        options.get("forward", plain_forward), options.get("loss", cross_entropy), options.get("metrics", accuracy)
    )
    batch = first_batch(next(iter(sets.values())), _BATCH)
    example = options.get("example")
    if example is None and functions.forward is plain_forward:
        example = inputs_of(batch)
    allow = tuple(options.get("allow", ()))
    with preserve_rng():
        make = Maker(model)
        bare = make()
        read, missing = read_given(bare, source, options)
        fresh = missing | declared(options.get("fresh", ()))
        known: Any = {name: options.get(name) for name in ("layers", "head", "labels")}
        plan = adapt(deep_copy(bare), read, fresh=fresh, allow=allow, example=example, **known).plan
        if isinstance(source, nn.Module) and source is model:
            check_own(plan, replace(read, module=unwrap(source)), source)
        head = [row for row in plan.rows if row.name in plan.possible_head]
        lacking = [row.name for row in head if row.source_shape is None or row.name in missing]
        headless = {name: missing.get(name, "not among the source's tensors") for name in lacking}
        outputs, metrics = tried(bare, functions, batch)
        try_sets(bare, functions, sets, tests)
        start = SourceModel(source_model(bare, read, plan, fresh).eval(), "given", read=read)
        theirs = None if headless else outputs_of(start.model, functions, batch)
    classes = bool(accuracy(outputs, batch)) and labels_of(batch).ndim == 1
    own_head = any(row.fresh for row in head)
    labels = labels_for(options.get("labels"), outputs, theirs, classes=classes, own_head=own_head)
    if headless and tests["source"] is not None:
        raise SourceError(
            f"held_out: the source model is scored on 'source', and it has no head: {next(iter(headless))!r} is "
            f"{next(iter(headless.values()))}. Give a source model with its own head, or leave 'source' out."
        )
    task = OwnTask(
        functions,
        OwnSets(sets, tests["target"], tests["valid"], tests["source_train"], tests["source"], *labels),
        headline(training, metrics),
        make,
        options.get("augment"),
        options.get("proxies"),
        classes=classes,
        shift=options.get("shift", "input"),
        usual_lr=options.get("usual_lr", OwnTask.usual_lr),
    )
    problem = OwnProblem(
        number=next(_NUMBERS),
        filled=isinstance(model, nn.Module) or isinstance(source, Itself),
        task=task,
        start=start,
        fresh=fresh,
        headless=headless,
        allow=allow,
        example=example,
        optimizer=options.get("optimizer"),
    )
    for target in sets:
        whole = OwnData(target=target, shots="all")
        check_shots(task, task.load(whole, OwnModel(), seed=0, source=True), SET_NAMES)
    return problem
