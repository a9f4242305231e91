"""The sets of a run: those that select, those that are only shown, and the test parts that are scored."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from conservtl.data import spread
from conservtl.experiments.run.scoring import Scores, score_model
from conservtl.experiments.run.setting import Setting
from conservtl.experiments.run.source_training import SourceModel
from conservtl.experiments.spec.spec import Spec
from conservtl.plan.plan import Plan

__all__ = ["device_of", "score_before", "score_on_tests", "selects_on_source", "sets_to_select_on", "sets_to_watch"]


def sets_to_watch(setting: Setting, source: SourceModel, most: int | None = None) -> dict[str, Any]:
    """Return at most so many examples of each test part, to be shown along the way and never selected on."""
    domains = setting.domains
    sets: dict[str, Any] = {"target": spread(domains.target_test, most)}
    if domains.source_test is not None:
        sets["source"] = setting.source_set(spread(domains.source_test, most), source.model)
    return sets


def sets_to_select_on(setting: Setting, source: SourceModel, *, both: bool) -> dict[str, Any] | None:
    """Return what may be selected on: the validation part of the shots, and for ``both`` the source's training data."""
    domains = setting.domains
    if domains.validation is None:
        return None
    sets: dict[str, Any] = {"target": domains.validation}
    if both and domains.source_train is not None and not setting.headless:
        sets["source"] = setting.source_set(domains.source_train, source.model)
    return sets


def selects_on_source(spec: Spec, plan: Plan) -> bool:
    """Return whether a choice of the run depends on the source's score too."""
    return spec.training.keep in ("harmonic", "path") or any(type(one).scored for one in plan.after)


def score_on_tests(setting: Setting, source: SourceModel, model: nn.Module) -> dict[str, Scores]:
    """Score an adapted model on both test parts, the source's as ``Setting.source_set`` says."""
    size = setting.spec.training.evaluate_batch_size
    sets = sets_to_watch(setting, source)
    tasks = {"source": setting.source_task}
    return {name: score_model(tasks.get(name, setting.task), model, data, size) for name, data in sets.items()}


def score_before(setting: Setting, source: SourceModel, start: nn.Module) -> dict[str, Scores]:
    """Score the source model on both test parts; on the target's the starting point, if its labels are others."""
    size, domains = setting.spec.training.evaluate_batch_size, setting.domains
    model = source.model if setting.shared else start
    scores = {"target": score_model(setting.task, model, domains.target_test, size)}
    if domains.source_test is not None:
        scores["source"] = score_model(setting.source_task, source.model, domains.source_test, size)
    return scores


def device_of(device: str) -> str:
    """Return the device type that ``fit`` will choose for ``training.device``."""
    return "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
