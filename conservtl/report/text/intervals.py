"""Means with their 95 % intervals, for pictures and text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from conservtl.report.text.metrics import ACCURACY, Metric, number, signed, true_minus

__all__ = ["MeanInterval", "difference_span", "metric_span", "single", "time_span"]


@dataclass(frozen=True)
class MeanInterval:
    """A mean with its interval; both ends are the mean if there is one value only, or all values are the same.

    Args:
        mean: in the shown unit.
        low: lower end.
        high: upper end.
        count: number of values.
        digits: after the point, where it is written.
    """

    mean: float
    low: float
    high: float
    count: int
    digits: int = 1

    @property
    def certain(self) -> bool:
        """Whether there is an interval to show."""
        return self.count > 1 and self.high > self.low

    def text(self) -> str:
        """Return the mean as text."""
        return true_minus(f"{self.mean:.{self.digits}f}")

    def ends(self) -> str:
        """Return the interval as text; empty if there is none."""
        low, high = (f"{end:.{self.digits}f}" for end in (self.low, self.high))
        return true_minus(f"{low}–{high}") if self.certain else ""

    def signed(self) -> str:
        """Return a difference with its sign."""
        return signed(self.mean, self.digits)

    def signed_ends(self) -> str:
        """Return the interval of a difference; empty if there is none."""
        return f"{signed(self.low, self.digits)} to {signed(self.high, self.digits)}" if self.certain else ""

    def mirrored(self, around: float = 0.0) -> MeanInterval:
        """Return ``around`` minus each value, with low and high exchanged."""
        return MeanInterval(around - self.mean, around - self.high, around - self.low, self.count, self.digits)


def single(value: float, metric: Metric = ACCURACY) -> MeanInterval:
    """Return the span of one value that is in the shown unit already."""
    return MeanInterval(value, value, value, 1, metric.digits)


def metric_span(value: Any, metric: Metric = ACCURACY) -> MeanInterval | None:
    """Return a metric's value, or {mean, low, high, count}, in the shown unit, its ends within the metric's bounds."""
    low, high = metric.bounds
    return _span(value, metric.scaled(1.0), metric.digits, low, high)


def difference_span(value: Any, metric: Metric = ACCURACY) -> MeanInterval | None:
    """Return a difference of a metric or its interval, in the shown unit."""
    return _span(value, metric.scaled(1.0), metric.digits)


def time_span(value: Any) -> MeanInterval | None:
    """Return a time in seconds or its interval, which is never negative."""
    return _span(value, 1.0, 1, low=0.0)


def _span(value: Any, scale: float, digits: int, low: float = -math.inf, high: float = math.inf) -> MeanInterval | None:
    if not isinstance(value, Mapping):
        value = {"mean": value}
    mean, *ends = (number(value.get(key)) for key in ("mean", "low", "high"))
    if mean is None:
        return None
    first, last = (scale * (mean if end is None else end) for end in ends)
    return MeanInterval(scale * mean, max(low, first), min(high, last), int(value.get("count") or 1), digits)
