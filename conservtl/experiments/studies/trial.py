"""One run among many: what it is, what names it, and its figures; nothing is written."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.data import ConcatDataset

from conservtl.adaptation.adaptation import Adaptation
from conservtl.adaptation.prepare import adapt
from conservtl.data import Data, Examples
from conservtl.engine import Training, fit, harmonic_mean
from conservtl.errors import SpecError
from conservtl.experiments.run.evaluation_sets import outputs_on, valid_sets, wants_source, watch_sets
from conservtl.experiments.run.scoring import scores
from conservtl.experiments.run.setting import Setting, augmentation, prepare
from conservtl.experiments.run.source_training import SourceModel, obtain_source
from conservtl.experiments.spec.spec import SpeechSpec, VisionSpec, parse_spec

__all__ = ["Trial", "run_trial"]

Tell = Callable[[Mapping[str, Any]], None]
How = Literal["adapt", "source", "scratch", "joint", "control"]


@dataclass(frozen=True)
class Trial:
    """One run of many.

    Args:
        variant: what is compared: a name.
        target: the speaker, the corruption, ...
        spec: of the run, seed and shots in it.
        how: adapt; source: nothing is trained; scratch: nothing comes from the source; joint: on source and target
            data together; control: from a network that was trained from scratch on the target's shots.
        path: whether the points between the starting point and the trained weights are measured too.
    """

    variant: str
    target: str
    spec: SpeechSpec | VisionSpec
    how: How = "adapt"
    path: bool = False

    @property
    def key(self) -> str:
        """Names everything that the run depends on."""
        from conservtl import __version__

        said = [
            self.spec.model_dump(mode="json", exclude={"compare", "sweep", "tune"}),
            self.how,
            self.path,
            __version__,
        ]
        return hashlib.sha256(json.dumps([*said, torch.__version__], sort_keys=True).encode()).hexdigest()[:20]

    @property
    def place(self) -> str:
        """Names the data and the source model, which trials can share."""
        return _place(self.spec)


def run_trial(trial: Trial, *, judge: bool = False, tell: Tell | None = None) -> dict[str, Any]:
    """Do it.

    Args:
        trial: what to do.
        judge: whether ``valid`` is wanted: accuracies on the validation part and on the source's training data.
        tell: called with each epoch's line of the history; what it raises ends the trial.

    Returns:
        ``variant``, ``target``, ``shots``, ``seed``; ``before`` and ``after``, each {"target": accuracy, "source":
        accuracy or None}; ``harmonic`` of the two afterwards (None without a source test part), ``seconds`` of
        adapting, ``trained`` parameters, ``steps``, ``path`` as ``FitResult`` has it.
    """
    setting, source, before = _shared(trial.place)
    setting = replace(setting, spec=trial.spec)
    begun = time.perf_counter()
    adaptation = _adaptation(trial.how, setting, source)
    result = None
    if trial.how != "source":
        result = fit(
            adaptation,
            _data(trial.how, setting),
            valid_sets(setting, source, both=judge or wants_source(trial.spec, adaptation.plan)),
            _quiet(setting),
            path=watch_sets(setting, source) if trial.path else None,
            source=setting.domains.source_train,
            augment=augmentation(setting.domains.augmentation),
            seed=trial.spec.seed,
            tell=tell,
        )
    seconds = time.perf_counter() - begun
    after = before if trial.how == "source" else _accuracies(setting, source, adaptation)
    kept = after["source"]
    return {
        "variant": trial.variant,
        "target": trial.target,
        "shots": trial.spec.data.shots,
        "seed": trial.spec.seed,
        "before": before,
        "after": after,
        "harmonic": None if kept is None else harmonic_mean([after["target"] or 0.0, kept]),
        "seconds": seconds,
        "trained": adaptation.plan.totals()["trained"] if trial.how != "source" else 0,
        "steps": result.steps if result else 0,
        "path": list(result.path) if result else [],
        "valid": _judged(result.history[-1]) if judge and result else None,
    }


def _judged(line: Mapping[str, Any]) -> dict[str, float]:
    """Accuracies on what may be selected on, from the last line of a history."""
    return {name: found["accuracy"] for name, found in line["valid"].items()}


def _place(spec: SpeechSpec | VisionSpec) -> str:
    """Everything but what adapts: task, model, source, data, seed."""
    shared = spec.model_dump(mode="json", include={"task", "model", "source", "data", "seed", "layers"})
    return json.dumps(shared, sort_keys=True)


@lru_cache(maxsize=2)
def _shared(place: str) -> tuple[Setting, SourceModel, dict[str, float | None]]:
    """Data and source model, read once for all trials that share them."""
    setting = prepare(parse_spec(json.loads(place)))
    source = obtain_source(setting)
    return setting, source, _accuracies(setting, source, None)


def _accuracies(setting: Setting, source: SourceModel, adaptation: Adaptation | None) -> dict[str, float | None]:
    """On both test parts; of the source model where nothing has been adapted yet."""
    model = source.model if adaptation is None else adaptation.model
    if adaptation is None and not setting.shared:
        model = setting.adaptation(source.model).model
    found = outputs_on(setting, source, model)
    return {name: scores(*found[name])["accuracy"] if name in found else None for name in ("target", "source")}


def _adaptation(how: How, setting: Setting, source: SourceModel) -> Adaptation:
    if how == "control":
        return setting.adaptation(_control(_place(setting.spec), setting.spec.training.model_dump_json()))
    return _scratch(setting) if how == "scratch" else setting.adaptation(source.model)


def _scratch(setting: Setting) -> Adaptation:
    model = setting.model(len(setting.domains.labels), target=True)
    return adapt(model, model, example=setting.example, layers=setting.spec.layers, fresh={"*": "from scratch"})


@lru_cache(maxsize=2)
def _control(place: str, training: str) -> nn.Module:
    """A network trained from scratch on the target's shots, once for all trials that start from it."""
    setting = _shared(place)[0]
    adaptation = _scratch(setting)
    settings = Training.model_validate_json(training)
    augment = augmentation(setting.domains.augmentation)
    fit(adaptation, setting.domains.shots, training=settings, augment=augment, seed=setting.spec.seed)
    return adaptation.model


def _data(how: How, setting: Setting) -> Data:
    """The shots; for joint training with the source's data, each domain as often as the other."""
    shots, others = setting.domains.shots, setting.domains.source_train
    if how != "joint":
        return shots
    if others is None or not setting.shared:
        raise SpecError("joint training needs source data with the target's labels. Leave it out of the baselines.")
    times = max(1, len(others) // len(shots))  # type: ignore[arg-type]
    if not isinstance(shots, Examples) or not isinstance(others, Examples):
        parts: list[Any] = [others, *[shots] * times]
        return ConcatDataset(parts)
    inputs = torch.cat([others.inputs, *[shots.inputs] * times])
    labels = torch.cat([others.labels, *[shots.labels] * times])
    return Examples(inputs, labels, others.names + shots.names * times)


def _quiet(setting: Setting) -> Any:
    """The training; without a validation part nothing is evaluated along the way."""
    training = setting.spec.training
    if setting.domains.validation is not None:
        return training
    return training.model_copy(update={"evaluate_every": training.epochs})
