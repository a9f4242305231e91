"""Selection: which weights are kept, and when training stops early. Looks at validation parts only."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from conservtl.engine.training import Training
from conservtl.errors import SpecError
from conservtl.layers import unwrap
from conservtl.plan.plan import Plan

__all__ = ["Selection", "check_selection", "harmonic_mean", "score"]


@dataclass
class Selection:
    """The best evaluation so far.

    Args:
        best: its score.
        loss: its loss, which decides between equal scores: few examples have few different accuracies.
        weights: the model's state dict then, on the CPU; None where it does not say what is kept.
        stale: evaluations since the score was last beaten.
    """

    best: float | None = None
    loss: float = math.inf
    weights: dict[str, Tensor] | None = None
    stale: int = 0

    def look(self, found: Mapping[str, Mapping[str, float]], model: nn.Module, training: Training) -> None:
        """Compare an evaluation with the best one, and remember the weights if they are to be kept."""
        value = score(found, training.keep)
        loss = sum(found[name]["loss"] for name in _judged(found, training.keep))
        better = self.best is None or value > self.best
        self.stale = 0 if better else self.stale + 1
        if not better and not (value == self.best and loss < self.loss):
            return
        self.best, self.loss = value, loss
        if training.keep in ("target", "harmonic"):
            tensors = unwrap(model).state_dict()
            self.weights = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def score(found: Mapping[str, Mapping[str, float]], keep: str) -> float:
    """What is selected on: accuracy where there is one, else the loss; higher is better.

    Args:
        found: {"target": metrics, "source": metrics}; without a source the target stands alone.
        keep: ``training.keep``; ``target`` looks at the target alone even where there is a source.
    """
    names = _judged(found, keep)
    if all("accuracy" in found[name] for name in names):
        value = harmonic_mean([found[name]["accuracy"] for name in names])
    else:
        value = -sum(found[name]["loss"] for name in names)
    return -math.inf if math.isnan(value) else value


def _judged(found: Mapping[str, object], keep: str) -> list[str]:
    """The sets that count."""
    return ["target"] if keep == "target" or "source" not in found else ["target", "source"]


def harmonic_mean(values: list[float]) -> float:
    """Of accuracies in [0, 1]; 0 where one is 0."""
    return len(values) / sum(1 / value for value in values) if all(value > 0 for value in values) else 0.0


def check_selection(training: Training, valid: Mapping[str, object], plan: Plan) -> None:
    """Whether there is what is to be selected on.

    Raises:
        SpecError: there is not; the message says where to get it.
    """
    asked = training.keep != "last" or training.patience is not None
    missing = [name for name in ("target", "source")[: 2 if training.keep == "harmonic" else 1] if name not in valid]
    if asked and missing:
        raise SpecError(
            f"training.keep={training.keep} and patience={training.patience} look at a validation part, but "
            f"valid has no {missing[0]!r}. Carve one from the shots (data.validation), or keep the last weights."
        )
    for one in plan.after:
        if training.keep == "path" and one.interpolates:
            raise SpecError(f"training.keep=path and {one.by} both interpolate the weights. Leave one of the two out.")
    choosing = [one.by for one in plan.after if one.scored] + [one.by for one in plan.searches]
    if choosing and "target" not in valid:
        raise SpecError(
            f"{choosing[0]} chooses on a validation part, but there is none. Carve one from the shots "
            "(data.validation), or pass valid={'target': ...}."
        )
