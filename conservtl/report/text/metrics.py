"""What is measured: its name, its unit, which direction is better, and how it is written."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["Metric", "Pair", "Verdict", "headline", "measure", "measured", "number", "pair"]

Verdict = Literal["better", "worse", "same", "unknown"]

_MINUS = "−"  # as wide as the plus sign, so that columns of differences line up


@dataclass(frozen=True)
class Metric:
    """One metric.

    Args:
        key: its name in the report.
        name: its name in a sentence.
        better: which direction is better.
        share: a share of 1, written in per cent, with differences in percentage points.
    """

    key: str
    name: str
    better: Literal["higher", "lower"] = "higher"
    share: bool = False

    @property
    def unit(self) -> str:
        """For the label of an axis; empty where there is none."""
        return "%" if self.share else ""

    def scaled(self, value: float) -> float:
        """In the unit that is shown."""
        return 100 * value if self.share else value

    def show(self, value: float | None) -> str:
        """A value with its unit."""
        if value is None:
            return "not measured"
        return f"{100 * value:.1f} %" if self.share else signless(f"{value:.3f}")

    def change(self, pair: Pair) -> str:
        """The difference with its sign and unit; empty where one side is missing."""
        if pair.before is None or pair.after is None:
            return ""
        digits = 1 if self.share else 3
        difference = round(self.scaled(pair.after) - self.scaled(pair.before), digits)
        sign = "±" if difference == 0 else "+" if difference > 0 else _MINUS
        return f"{sign}{abs(difference):.{digits}f}" + (" points" if self.share else "")

    def gain(self, pair: Pair) -> float | None:
        """By how much it got better; negative where it got worse."""
        if pair.before is None or pair.after is None:
            return None
        difference = pair.after - pair.before
        return difference if self.better == "higher" else -difference

    def verdict(self, pair: Pair) -> Verdict:
        """Better or worse by at least what the written digits can show."""
        gain = self.gain(pair)
        if gain is None:
            return "unknown"
        gain = round(gain, 3)
        return "better" if gain > 0 else "worse" if gain < 0 else "same"


@dataclass(frozen=True)
class Pair:
    """One metric of one domain, before and after; None where it was not measured."""

    before: float | None
    after: float | None

    @property
    def measured(self) -> bool:
        """Whether there is anything to show."""
        return self.before is not None or self.after is not None


_KNOWN = (
    Metric("accuracy", "accuracy", share=True),
    Metric("balanced_accuracy", "balanced accuracy", share=True),
    Metric("f1", "F1", share=True),
    Metric("wer", "word error rate", "lower", share=True),
    Metric("cer", "character error rate", "lower", share=True),
    Metric("loss", "loss", "lower"),
)


def signless(text: str) -> str:
    """With a minus sign as wide as the plus sign."""
    return text.replace("-", _MINUS)


def number(value: Any) -> float | None:
    """A finite float, or None: NaN means that nothing was measured."""
    if value is None or isinstance(value, bool | str | Mapping | list | tuple):
        return None
    result = float(value)
    return result if math.isfinite(result) else None


def measure(key: str) -> Metric:
    """The metric of this name; one that is not known is a plain number, higher is better."""
    return next((known for known in _KNOWN if known.key == key), Metric(key, key.replace("_", " ")))


def pair(report: Mapping[str, Any], domain: str, key: str) -> Pair:
    """A metric of a domain (``target`` or ``source``), before and after."""
    sides = [((report.get(side) or {}).get(domain) or {}).get(key) for side in ("before", "after")]
    return Pair(number(sides[0]), number(sides[1]))


def measured(report: Mapping[str, Any], domain: str) -> list[Metric]:
    """The metrics of a domain: known ones first, the one that matters most at the top."""
    sides = [(report.get(side) or {}).get(domain) or {} for side in ("before", "after")]
    keys = list(dict.fromkeys(key for side in sides for key in side))
    order = [known.key for known in _KNOWN if known.key in keys]
    order += [key for key in keys if key not in order]
    return [measure(key) for key in order if pair(report, domain, key).measured]


def headline(report: Mapping[str, Any]) -> Metric:
    """The metric a run is judged by: accuracy, else word error rate, else what the target has."""
    of_target = measured(report, "target")
    return of_target[0] if of_target else measure("accuracy")
