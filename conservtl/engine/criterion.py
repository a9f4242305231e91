"""The metric that decides between weights, and its direction."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any, Literal

from pydantic import model_validator

from conservtl.errors import SpecError, did_you_mean
from conservtl.spec_model import FrozenModel

__all__ = [
    "ACCURACY",
    "KNOWN_DIRECTIONS",
    "LOSS",
    "Criterion",
    "check_metric",
    "default_criterion",
    "harmonic_mean",
    "judged",
    "score",
]

KNOWN_DIRECTIONS = {"accuracy": "higher", "loss": "lower", "wer": "lower", "cer": "lower"}

Evaluation = Mapping[str, Mapping[str, float]]


class Criterion(FrozenModel):
    """A metric to select on. ``accuracy``, ``loss``, ``wer`` and ``cer`` are known by name; others need a direction."""

    metric: str
    """Name of the metric, as the run's metrics return it, or ``loss``."""
    direction: Literal["higher", "lower"]
    """Which values are better."""

    @model_validator(mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        fields = {"metric": value} if isinstance(value, str) else value
        if not isinstance(fields, Mapping) or not isinstance(metric := fields.get("metric"), str):
            return fields
        known = KNOWN_DIRECTIONS.get(metric)
        direction = fields.get("direction", known)
        if direction is None:
            raise ValueError(
                f"the direction of {metric!r} is not known; known are {', '.join(KNOWN_DIRECTIONS)}."
                f"{did_you_mean(metric, KNOWN_DIRECTIONS)} For another metric write "
                f"select: {{metric: {metric}, direction: higher}}, or lower"
            )
        if known not in (None, direction):
            raise ValueError(f"{metric} is better when it is {known}; received direction {direction!r}: leave it out")
        return {**fields, "direction": direction}


ACCURACY = Criterion(metric="accuracy", direction="higher")
"""The metric of ``training.select`` by default."""

LOSS = Criterion(metric="loss", direction="lower")
"""The metric by default where nothing else is measured."""


def score(evaluation: Evaluation, keep: str, select: Criterion | None = None) -> float:
    """Return the score of an evaluation; higher is better.

    For a metric of which higher values are better, the score of target and source together is their harmonic mean,
    which must not be negative; for one of which lower values are better, minus their sum. The score of the target
    alone is the metric, or minus the metric.

    Args:
        evaluation: {"target": metrics, "source": metrics}; without a source the target counts alone.
        keep: ``training.keep``; with ``target`` the target counts alone.
        select: the metric; None: accuracy, or the loss if it is all that is measured.

    Returns:
        The score; minus infinity if a value is NaN.

    Raises:
        SpecError: a set has no such metric, or the harmonic mean is not defined.

    Example:
        >>> evaluation = {"target": {"loss": 2.0, "accuracy": 0.5}, "source": {"loss": 1.0, "accuracy": 1.0}}
        >>> round(score(evaluation, "harmonic"), 3), score(evaluation, "target")
        (0.667, 0.5)
        >>> score(evaluation, "harmonic", Criterion(metric="loss", direction="lower"))
        -3.0
    """
    criterion = select or default_criterion(evaluation, keep)
    sets = judged(evaluation, keep)
    for name in sets:
        check_metric(criterion, evaluation[name], name)
    values = {name: evaluation[name][criterion.metric] for name in sets}
    if any(math.isnan(value) for value in values.values()):
        return -math.inf
    if criterion.direction == "lower":
        return -sum(values.values())
    if len(values) == 1:
        return next(iter(values.values()))
    if negative := [name for name, value in values.items() if value < 0]:
        raise SpecError(
            f"training.select: the harmonic mean of target and source needs values of at least 0; {criterion.metric!r} "
            f"of {negative[0]!r} is {values[negative[0]]:g}. Select on the target alone (training.keep: target), or on "
            "another metric."
        )
    return harmonic_mean(list(values.values()))


def default_criterion(evaluation: Evaluation, keep: str) -> Criterion:
    """Return the metric to select on if none is named: accuracy, or the loss if it is all that is measured."""
    return LOSS if all(set(evaluation[name]) == {"loss"} for name in judged(evaluation, keep)) else ACCURACY


def judged(evaluation: Mapping[str, object], keep: str) -> list[str]:
    """Return the sets that count."""
    return ["target"] if keep == "target" or "source" not in evaluation else ["target", "source"]


def harmonic_mean(values: list[float]) -> float:
    """Return the harmonic mean of values of at least 0, such as accuracies; 0 if one is 0."""
    return len(values) / sum(1 / value for value in values) if all(value > 0 for value in values) else 0.0


def check_metric(criterion: Criterion, metrics: Collection[str], name: str) -> None:
    """Raise unless a metric is among those of a set."""
    if criterion.metric not in metrics:
        other = next((metric for metric in metrics if metric != "loss"), "loss")
        raise SpecError(
            f"training.select: {criterion.metric!r} is not among the metrics of the validation set {name!r}, which are "
            f"{', '.join(map(repr, metrics))}. Name one of them, such as training.select={other!r}."
        )
