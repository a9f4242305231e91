"""Selection of the weights to keep, and early stopping, by validation sets only."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from conservtl.engine.criterion import check_metric, default_criterion, judged, score
from conservtl.engine.evaluation import Holdout
from conservtl.engine.training import Training
from conservtl.errors import SpecError
from conservtl.functions import Metrics, accuracy
from conservtl.kernels.dtensor import part_of
from conservtl.layers import unwrap
from conservtl.plan.plan import Plan

__all__ = ["Selection", "check_selection", "deciders", "decides"]


@dataclass
class Selection:
    """The best evaluation so far.

    Args:
        best: its score; None before the first evaluation with a score.
        loss: its loss, which decides between equal scores: few examples have few different accuracies.
        weights: the model's state dict then, on the CPU, of sharded tensors this process's parts; None unless the
            settings keep the best weights.
        stale: evaluations since the score was last beaten.
    """

    best: float | None = None
    loss: float = math.inf
    weights: dict[str, Tensor] | None = None
    stale: int = 0

    def look(
        self,
        evaluation: Mapping[str, Mapping[str, float]],
        model: nn.Module,
        training: Training,
        *,
        decides: bool = False,
    ) -> None:
        """Compare an evaluation with the best one, and copy the weights if they are to be kept.

        Metrics without an accuracy are passed over if the settings name no metric and nothing is decided.
        """
        sets = judged(evaluation, training.keep)
        metric = (training.select or default_criterion(evaluation, training.keep)).metric
        if training.select is None and not decides and any(metric not in evaluation[name] for name in sets):
            return
        value = score(evaluation, training.keep, training.select)
        loss = sum(evaluation[name]["loss"] for name in sets)
        better = self.best is None or value > self.best
        self.stale = 0 if better else self.stale + 1
        if not better and not (value == self.best and loss < self.loss):
            return
        self.best, self.loss = value, loss
        if training.keep in ("target", "harmonic"):
            tensors = unwrap(model).state_dict()
            self.weights = {name: part_of(tensor) for name, tensor in tensors.items()}


def decides(training: Training, plan: Plan) -> bool:
    """Return whether a validation score decides anything."""
    return bool(deciders(training, plan))


def deciders(training: Training, plan: Plan) -> list[str]:
    """Return the settings and strategies that decide by a validation score, as a message names them."""
    return [*_selecting(training), *_choosers(plan)]


def check_selection(training: Training, valid: Mapping[str, object], plan: Plan, metrics: Metrics) -> None:
    """Raise unless the validation sets and metrics that decide are there.

    Metrics are checked here if they are the default ones, else at the first evaluation.
    """
    missing = [name for name in ("target", "source")[: 2 if training.keep == "harmonic" else 1] if name not in valid]
    if missing and (selecting := _selecting(training)):
        verb, them = ("choose", "them") if len(selecting) > 1 else ("chooses", "it")
        fix = "Carve one from the shots (data.validation)" if missing[0] == "target" else "Pass source data"
        raise SpecError(
            f"{' and '.join(selecting)} {verb} by a validation set, but valid has no {missing[0]!r}. {fix}, or leave "
            f"{them} out."
        )
    for after in plan.after:
        if training.keep == "path" and after.interpolates:
            raise SpecError(f"training.keep=path and {after.by} both interpolate the weights. Leave one of them out.")
    choosing = _choosers(plan)
    if choosing and "target" not in valid:
        raise SpecError(
            f"{choosing[0]} chooses on a validation part, but there is none. Carve one from the shots "
            "(data.validation), or pass valid={'target': ...}."
        )
    select = training.select
    if select is None or "target" not in valid:
        return
    for name in judged(valid, training.keep):
        data = valid[name]
        if ((data.metrics if isinstance(data, Holdout) else None) or metrics) is accuracy:
            check_metric(select, ("loss", "accuracy"), name)


def _selecting(training: Training) -> list[str]:
    """Return the settings that keep weights, or stop, by a validation score."""
    keep = [] if training.keep == "last" else [f"training.keep={training.keep}"]
    return keep if training.patience is None else [*keep, f"training.patience={training.patience}"]


def _choosers(plan: Plan) -> list[str]:
    """Return the strategies that choose by a validation score."""
    return [after.by for after in plan.after if after.scored] + [search.by for search in plan.searches]
