"""Metrics: name, unit, direction, and how values and differences are written."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

__all__ = [
    "ACCURACY",
    "Metric",
    "Pair",
    "Verdict",
    "headline",
    "metric_named",
    "metrics_of",
    "number",
    "pair",
    "signed",
    "true_minus",
]

Verdict = Literal["better", "worse", "same", "unknown"]

_MINUS = "−"  # as wide as the plus sign, so that columns of differences line up


@dataclass(frozen=True)
class Metric:
    """One metric.

    Args:
        key: its name in the report.
        name: its name in a sentence.
        better: which direction is better; None if unknown.
        share: whether it is a share of 1, written in per cent, with differences in percentage points.
    """

    key: str
    name: str
    better: Literal["higher", "lower"] | None = "higher"
    share: bool = False

    @property
    def unit(self) -> str:
        """Unit of shown values; empty if there is none."""
        return "%" if self.share else ""

    @property
    def label(self) -> str:
        """Name with the unit, for an axis or a column."""
        return self.with_unit(self.name)

    @property
    def digits(self) -> int:
        """Digits after the point."""
        return 1 if self.share else 3

    @property
    def direction(self) -> str:
        """The name and which direction is better, as the start of a sentence."""
        name = f"{self.name[:1].upper()}{self.name[1:]}"
        return name if self.better is None else f"{name} ({self.better} is better)"

    @property
    def combination(self) -> str:
        """Name of the score for target and source together."""
        return "mean" if self.better == "lower" else "harmonic mean"

    @property
    def bounds(self) -> tuple[float, float]:
        """Lowest and highest possible value, in the shown unit."""
        return (0.0, 100.0) if self.share else (-math.inf, math.inf)

    @property
    def kept(self) -> str:
        """Head of a column of the source's values."""
        return self.with_unit("source" if self.better == "lower" else "source kept")

    def with_unit(self, name: str) -> str:
        """Return a name followed by the unit in brackets."""
        return f"{name} ({self.unit})" if self.unit else name

    def scaled(self, value: float) -> float:
        """Return a value in the shown unit."""
        return 100 * value if self.share else value

    def show(self, value: float | None) -> str:
        """Return a value as text with its unit."""
        return "not measured" if value is None else self.show_scaled(self.scaled(value))

    def show_scaled(self, value: float) -> str:
        """Return a value that is in the shown unit already as text."""
        return true_minus(f"{value:.{self.digits}f}") + (f" {self.unit}" if self.unit else "")

    def change(self, pair: Pair) -> str:
        """Return the difference with its sign and unit; empty if one side is missing."""
        if pair.before is None or pair.after is None:
            return ""
        return self.show_difference(self.scaled(pair.after) - self.scaled(pair.before))

    def show_difference(self, difference: float) -> str:
        """Return a difference in the shown unit as text."""
        return signed(difference, self.digits) + (" points" if self.share else "")

    def gain(self, pair: Pair) -> float | None:
        """Return by how much the value got better, negative if worse; None if that is unknown."""
        if pair.before is None or pair.after is None or self.better is None:
            return None
        return self.rank(pair.after) - self.rank(pair.before)

    def rank(self, value: float) -> float:
        """Return a key that is largest for the best value."""
        return -value if self.better == "lower" else value

    def verdict(self, pair: Pair) -> Verdict:
        """Judge a change: better or worse by at least the last written digit."""
        gain = self.gain(pair)
        if gain is None:
            return "unknown"
        gain = round(gain, 3)
        return "better" if gain > 0 else "worse" if gain < 0 else "same"

    def combined(self, target: float, source: float) -> float:
        """Return one score for both domains: the harmonic mean, or the mean if lower is better."""
        if self.better == "lower":
            return (target + source) / 2
        return 2 * target * source / (target + source) if target > 0 and source > 0 else 0.0


@dataclass(frozen=True)
class Pair:
    """One metric of one domain, before and after; None where it was not measured."""

    before: float | None
    after: float | None

    @property
    def measured(self) -> bool:
        """Whether at least one side was measured."""
        return self.before is not None or self.after is not None


ACCURACY = Metric("accuracy", "accuracy", share=True)

_KNOWN = (
    ACCURACY,
    Metric("balanced_accuracy", "balanced accuracy", share=True),
    Metric("f1", "F1", share=True),
    Metric("wer", "word error rate", "lower", share=True),
    Metric("cer", "character error rate", "lower", share=True),
    Metric("mae", "mean absolute error", "lower"),
    Metric("mse", "mean squared error", "lower"),
    Metric("rmse", "root mean squared error", "lower"),
    Metric("perplexity", "perplexity", "lower"),
    Metric("loss", "loss", "lower"),
)


def true_minus(text: str) -> str:
    """Return the text with a minus sign as wide as the plus sign."""
    return text.replace("-", _MINUS)


def signed(value: float, digits: int = 1) -> str:
    """Return a difference with its sign."""
    value = round(value, digits)
    sign = "±" if value == 0 else "+" if value > 0 else _MINUS
    return f"{sign}{abs(value):.{digits}f}"


def number(value: Any) -> float | None:
    """Return a finite float; None if the value is missing, NaN or no number."""
    if value is None or isinstance(value, bool | str | Mapping | list | tuple):
        return None
    result = float(value)
    return result if math.isfinite(result) else None


def metric_named(key: str) -> Metric:
    """Return the metric of this key; an unknown one is a plain number of unknown direction."""
    return next((metric for metric in _KNOWN if metric.key == key), Metric(key, key.replace("_", " "), None))


def pair(report: Mapping[str, Any], domain: str, key: str) -> Pair:
    """Return a metric of a domain (``target`` or ``source``), before and after."""
    before, after = (((report.get(side) or {}).get(domain) or {}).get(key) for side in ("before", "after"))
    return Pair(number(before), number(after))


def metrics_of(report: Mapping[str, Any], domain: str) -> list[Metric]:
    """Return the metrics that were measured on a domain: the headline first, then known ones, then the others."""
    sides = [(report.get(side) or {}).get(domain) or {} for side in ("before", "after")]
    keys = list(dict.fromkeys(key for side in sides for key in side if pair(report, domain, key).measured))
    known = {metric.key: metric for metric in _KNOWN}
    if (stated := _stated(report)) is not None:
        known = {stated.key: stated} | {key: metric for key, metric in known.items() if key != stated.key}
    order = [key for key in known if key in keys] + [key for key in keys if key not in known]
    return [known.get(key) or metric_named(key) for key in order]


def headline(report: Mapping[str, Any]) -> Metric:
    """Return the metric a report is judged by: the one it names, else the first that the target has, else accuracy."""
    if (stated := _stated(report)) is not None:
        return stated
    measured = metrics_of(report, "target")
    return measured[0] if measured else ACCURACY


def _stated(report: Mapping[str, Any]) -> Metric | None:
    given = report.get("metric")
    if not given:
        return None
    return Metric(str(given["key"]), str(given["name"]), given["better"], bool(given["share"]))
