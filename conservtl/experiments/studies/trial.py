"""One run among many: its key, and the headline metrics it gives; it writes nothing."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import nn

from conservtl.adaptation.adaptation import Adaptation
from conservtl.data import Data, Domains, join, length_of
from conservtl.engine import Training
from conservtl.errors import SpecError
from conservtl.experiments.run.evaluation_sets import (
    score_before,
    score_on_tests,
    selects_on_source,
    sets_to_select_on,
    sets_to_watch,
)
from conservtl.experiments.run.setting import Setting
from conservtl.experiments.run.source_labels import labels_used
from conservtl.experiments.run.source_training import SourceModel, prepare_source
from conservtl.experiments.spec.spec import Spec, with_fields
from conservtl.experiments.studies.judge import Judge
from conservtl.plan.table import rows_by_label
from conservtl.tasks.bad_files import skipped_report

__all__ = ["How", "Trial", "forget_shared", "on_target", "run_trial"]

Tell = Callable[[Mapping[str, Any]], None]
How = Literal["adapt", "source", "scratch", "joint", "control"]

_FORMAT = 3  # of a stored result
_SHARED = {"task", "model", "source", "data", "seed", "layers", "fresh"}
"""Fields that say what data and which source model a run has."""


@dataclass(frozen=True)
class Trial:
    """One run of many.

    Args:
        variant: label of the variant that it belongs to.
        target: the speaker, the corruption, ...
        spec: of the run, with its seed and shots.
        how: adapt; source: train nothing; scratch: take nothing from the source; joint: train on source and target
            data together; control: start from a network that was trained from scratch on the target's shots.
        path: whether the points between the starting point and the trained weights are evaluated too.
    """

    variant: str
    target: str
    spec: Spec
    how: How = "adapt"
    path: bool = False

    @property
    def key(self) -> str:
        """A name for everything that the result depends on."""
        from conservtl import __version__

        spec = self.spec.model_dump(mode="json", exclude={"compare", "sweep", "tune"})
        parts = [spec, self.how, self.path, __version__, torch.__version__, _FORMAT]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]

    @property
    def place(self) -> str:
        """The data and the source model, which trials share, as JSON: every field that does not adapt."""
        return _Place.of(self.spec).key

    @property
    def trains_source(self) -> bool:
        """Whether its source model is trained, unless it was before: the spec gives no weights."""
        return self.spec.held is None and self.spec.source.weights is None

    def domains(self) -> Domains:
        """Return its data, read once for all trials that share it."""
        return _shared(_Place.of(self.spec))[0].domains

    def headless(self) -> bool:
        """Return whether its source has no head, and so no score."""
        return _shared(_Place.of(self.spec))[0].headless


def on_target(spec: Spec, target: str) -> Spec:
    """Return the spec with another target: a speaker, a corruption, ..."""
    fields = spec.problem.on_target(spec.data, target)
    return with_fields(spec, fields) if fields else spec


def run_trial(trial: Trial, *, judge: bool = False, tell: Tell | None = None) -> dict[str, Any]:
    """Run the trial and return its metrics; ``tell`` gets each epoch's line of the history, and may end the trial.

    Returns:
        ``variant``, ``target``, ``shots``, ``seed``; ``taken``, the number of examples of each class; ``before`` and
        ``after``, the headline metric of "target" and "source" (None without a source test part); ``harmonic``, the
        score of both afterwards; ``headless``, whether the source has no head; ``seconds`` of adapting;
        ``rows_by_label``, how many rows of a layer are copied by label; ``skipped`` files, as a report has them; number
        of ``trained`` parameters; ``steps``; ``path`` as ``FitResult`` has it;
        ``weights``, how far each layer moved from the source and the norm of each fresh parameter.
    """
    setting, source, before = _shared(_Place.of(trial.spec))
    setting = replace(setting, spec=trial.spec)
    begun = time.perf_counter()
    adaptation = _adaptation(trial.how, setting, source)
    result = None
    if trial.how != "source":
        result = setting.fit(
            adaptation,
            _training_data(trial.how, setting),
            sets_to_select_on(setting, source, both=judge or selects_on_source(trial.spec, adaptation.plan)),
            _training(setting),
            path=sets_to_watch(setting, source) if trial.path else None,
            tell=tell,
        )
    seconds = time.perf_counter() - begun if trial.how != "source" else 0.0
    after = before if trial.how == "source" else _headlines(setting, source, adaptation)
    both = after["target"] is not None and after["source"] is not None
    return {
        "variant": trial.variant,
        "target": trial.target,
        "shots": trial.spec.model_dump(mode="json")["data"]["shots"],
        "taken": setting.taken,
        "seed": trial.spec.seed,
        "before": before,
        "after": after,
        "harmonic": Judge(setting.task.headline).score(after) if both else None,
        "seconds": seconds,
        "weights": _weights(adaptation),
        "headless": setting.headless,
        "rows_by_label": list(rows_by_label(adaptation.plan).values()),
        "skipped": skipped_report(setting.domains.skipped),
        "trained": adaptation.plan.totals()["trained"] if trial.how != "source" else 0,
        "steps": result.steps if result else 0,
        "path": list(result.path) if result else [],
        "valid": _on_valid(setting, result.history[-1]) if judge and result else None,
    }


def _weights(adaptation: Adaptation) -> dict[str, float]:
    """Return the drift of each layer, and the norm of each fresh parameter, which has none."""
    parameters = adaptation.bound.parameters()
    return adaptation.drift() | {name: float(parameters[name].detach().norm()) for name in adaptation.plan.fresh}


def forget_shared() -> None:
    """Forget data, source models and controls that were kept for further trials."""
    _shared.cache_clear()
    _control.cache_clear()


def _on_valid(setting: Setting, line: Mapping[str, Any]) -> dict[str, float]:
    """Headline metrics of the sets to select on, from the last line of a history."""
    return {name: metrics[setting.task.headline.metric] for name, metrics in line["valid"].items()}


@dataclass(frozen=True)
class _Place:
    """The data and the source model of a spec, equal if their names are.

    Args:
        key: every field that does not adapt, as JSON.
        spec: with these fields; the others have their defaults.
    """

    key: str
    spec: Spec = field(compare=False)

    @classmethod
    def of(cls, spec: Spec) -> _Place:
        """Return the place of a spec."""
        bare = type(spec).model_fields.keys() - _SHARED
        defaults = {name: type(spec).model_fields[name].get_default(call_default_factory=True) for name in bare}
        key = json.dumps(spec.model_dump(mode="json", include=_SHARED), sort_keys=True)
        return cls(key, spec.model_copy(update=defaults))


@lru_cache(maxsize=2)
def _shared(place: _Place) -> tuple[Setting, SourceModel, dict[str, float | None]]:
    """Data and source model, read once for all trials that share them."""
    setting, source = prepare_source(place.spec)
    return setting, source, _headlines(setting, source, None)


def _headlines(setting: Setting, source: SourceModel, adaptation: Adaptation | None) -> dict[str, float | None]:
    """Return the headline metric on both test parts; of the source model if nothing is adapted yet."""
    if adaptation is not None:
        scores = score_on_tests(setting, source, adaptation.model)
    else:
        start = source.model if setting.shared else setting.adaptation(source.with_notes()).model
        scores = score_before(setting, source, start)
    metric = setting.task.headline.metric
    return {name: scores[name].metrics[metric] if name in scores else None for name in ("target", "source")}


def _adaptation(how: How, setting: Setting, source: SourceModel) -> Adaptation:
    if how == "control":
        return setting.adaptation(_control(_Place.of(setting.spec), setting.spec.training.model_dump_json()))
    return setting.scratch() if how == "scratch" else setting.adaptation(source.with_notes())


@lru_cache(maxsize=2)
def _control(place: _Place, training: str) -> nn.Module:
    """Return a network trained from scratch on the target's shots, once for all trials that start from it."""
    setting = _shared(place)[0]
    adaptation = setting.scratch()
    setting.fit(adaptation, setting.domains.shots, training=_unlogged(Training.model_validate_json(training)))
    return adaptation.model


def _training_data(how: How, setting: Setting) -> Data:
    """Return the shots; for joint training also the source's data, each domain as often as the other."""
    shots, source = setting.domains.shots, setting.domains.source_train
    if how != "joint":
        return shots
    labels, own = setting.domains.labels, setting.domains.source_labels
    if source is not None and setting.headless:  # numbered by the target's labels
        own = labels
    if source is None or any(own[place] not in labels for place in labels_used([source], len(own))):
        raise SpecError("joint training needs source data with the target's labels. Leave it out of the baselines.")
    if own != labels:
        places = {label: place for place, label in enumerate(labels)}
        source = setting.task.renumbered(source, [places.get(label, -1) for label in own])
    return join([source, *[shots] * max(1, length_of(source) // length_of(shots))])


def _unlogged(training: Training) -> Training:
    """Return settings without trackers, which follow one run in one folder."""
    return training.model_copy(update={"log": ()})


def _training(setting: Setting) -> Training:
    """Return the spec's training, not logged; without a validation part nothing is evaluated before the last epoch."""
    training = _unlogged(setting.spec.training)
    if setting.domains.validation is not None:
        return training
    return training.model_copy(update={"evaluate_every": training.epochs})
