"""Comparisons of headline metrics: which value is better, and one score for both domains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from conservtl.engine import Criterion, score
from conservtl.experiments.studies.bootstrap import constrained
from conservtl.tasks.headline import Headline

__all__ = ["Judge"]


@dataclass(frozen=True)
class Judge:
    """Judges runs by a task's headline metric.

    Args:
        headline: the metric, its direction, and whether it is a share of 1.
    """

    headline: Headline

    @property
    def combination(self) -> str:
        """Name of the score for both domains."""
        return "harmonic mean" if self.headline.better == "higher" else "mean"

    def both(self, target: float, source: float) -> float:
        """Return one value for both domains, in the metric's unit: the score that ``training.keep`` selects by.

        The harmonic mean where higher values are better, the mean where lower ones are.
        """
        metric = self.headline.metric
        select = Criterion(metric=metric, direction=self.headline.better)
        value = score({"target": {metric: target}, "source": {metric: source}}, "harmonic", select)
        return value if self.headline.better == "higher" else -value / 2

    def score(self, values: Mapping[str, Any]) -> float:
        """Return the value that decides: of both domains, or of the target where the source has no data."""
        if values.get("source") is None:
            return float(values["target"])
        return self.both(values["target"], values["source"])

    def gain(self, value: float, reference: float) -> float:
        """Return by how much a value is better than another; negative where it is worse."""
        return value - reference if self.headline.better == "higher" else reference - value

    def rank(self, value: float) -> float:
        """Return a key that is largest for the best value."""
        return self.gain(value, 0.0)

    def constrained(self, runs: Sequence[tuple[float, float, float, float]]) -> float | None:
        """Return the constrained score of runs (``bootstrap.constrained``); None where the metric is no share."""
        if not self.headline.share or not runs:
            return None
        right = [(self._right(a), self._right(b), self._right(c), self._right(d)) for a, b, c, d in runs]
        return constrained(right)

    def _right(self, share: float) -> float:
        """Return the share that is right."""
        return share if self.headline.better == "higher" else 1 - share
