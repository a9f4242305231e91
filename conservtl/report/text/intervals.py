"""Means with their 95 % intervals, as they are drawn and written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from conservtl.report.text.metrics import number, signless

__all__ = ["Span", "harmonic", "points", "seconds", "share", "signed"]


@dataclass(frozen=True)
class Span:
    """A mean with its interval; of one value only, both ends are the mean.

    Args:
        mean: in the unit that is shown.
        low: lower end.
        high: upper end.
        count: number of values.
    """

    mean: float
    low: float
    high: float
    count: int

    @property
    def bars(self) -> tuple[tuple[float], tuple[float]]:
        """What matplotlib's error bars take."""
        return (max(0.0, self.mean - self.low),), (max(0.0, self.high - self.mean),)

    @property
    def certain(self) -> bool:
        """Whether there is an interval to show."""
        return self.count > 1

    def text(self, digits: int = 1) -> str:
        """The mean."""
        return signless(f"{self.mean:.{digits}f}")

    def ends(self, digits: int = 1) -> str:
        """The interval; empty where one value has none."""
        return signless(f"{self.low:.{digits}f}–{self.high:.{digits}f}") if self.certain else ""

    def signed(self) -> str:
        """A difference with its sign."""
        return signed(self.mean)

    def signed_ends(self) -> str:
        """The interval of a difference."""
        return f"{signed(self.low)} to {signed(self.high)}" if self.certain else ""


def share(value: Any) -> Span | None:
    """A share of 1, or an interval of shares, in per cent; no end lies where no share can."""
    given = points(value)
    if given is None:
        return None
    return Span(given.mean, max(0.0, given.low), min(100.0, given.high), given.count)


def points(value: Any) -> Span | None:
    """A difference of shares, or its interval, in percentage points."""
    return _span(value, 100.0)


def seconds(value: Any) -> Span | None:
    """A time, which is never negative."""
    given = _span(value, 1.0)
    return None if given is None else Span(given.mean, max(0.0, given.low), given.high, given.count)


def harmonic(target: float, source: float) -> float:
    """The harmonic mean of two numbers that are not negative."""
    return 2 * target * source / (target + source) if target + source > 0 else 0.0


def _span(value: Any, scale: float) -> Span | None:
    if not isinstance(value, Mapping):
        mean = number(value)
        return None if mean is None else Span(scale * mean, scale * mean, scale * mean, 1)
    mean, low, high = (number(value.get(key)) for key in ("mean", "low", "high"))
    if mean is None:
        return None
    ends = [mean if end is None else end for end in (low, high)]
    return Span(scale * mean, scale * ends[0], scale * ends[1], int(value.get("count") or 1))


def signed(value: float) -> str:
    """A difference with its sign, as wide for minus as for plus."""
    value = round(value, 1)
    sign = "±" if value == 0 else "+" if value > 0 else "−"
    return f"{sign}{abs(value):.1f}"
