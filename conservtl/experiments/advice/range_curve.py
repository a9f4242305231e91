"""The loss curve of a range test: smoothing, divergence, and the two rates that are read off it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from conservtl.errors import MissingExtraError, SpecError
from conservtl.fragments import fragment
from conservtl.report import range_test_sentence, write_range_test
from conservtl.report.figures.canvas import Picture
from conservtl.report.pages.range_test_page import range_test_picture
from conservtl.report.text.html_table import Cell, HtmlTable, TableRow

__all__ = ["RangeTest", "diverges", "read_curve"]

_SHARE = 0.1  # of the rate at the minimum: there the loss still falls, a decade further it already rises
_FLAT = 0.05  # of the way from the minimum back to the start: less is no rise
_WIDTH = 3.0  # steps: batches of a few examples differ by more than neighbouring rates do
_DIVERGED = 4.0  # times the lowest loss, as is usual, and above the first loss
_FIRST = 10  # losses that set the scale of an explosion; a curve that ends within them is not readable


@dataclass(frozen=True)
class RangeTest:
    """Losses of a range test, and the rates read off them.

    Args:
        rates: of the optimizer, rising geometrically; the plan's ratios multiply them.
        losses: the loss before each step.
        smoothed: losses averaged over neighbouring steps.
        suggestion: a rate for ``training.lr``: a tenth of the rate at the minimum of the smoothed loss; if the minimum
            is flat, of the highest rate on it.
        steepest: the rate at which the smoothed loss falls fastest over the logarithm of the rate: the lowest that is
            worth trying.
        diverged: whether the test ended before the last rate because the loss rose.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]
    suggestion: float
    steepest: float
    diverged: bool

    @property
    def best(self) -> float:
        """The suggested rate."""
        return self.suggestion

    def table(self) -> HtmlTable:
        """Return the rates that were read off, and the smoothed loss at them."""
        rows = []
        for name, rate in (("suggested", self.suggestion), ("steepest", self.steepest), ("last", self.rates[-1])):
            place = min(range(len(self.rates)), key=lambda at, rate=rate: abs(math.log(self.rates[at] / rate)))  # type: ignore[misc]
            rows.append(TableRow([Cell(name), Cell(f"{rate:.1e}"), Cell(f"{self.smoothed[place]:.3g}")]))
        note = "The loss diverged at the last rate." if self.diverged else "The loss did not diverge."
        return HtmlTable("Range test", note, ["rate", "value", "loss near it"], rows)

    def figure(self) -> Picture:
        """Return the picture of the loss against the rate.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        return range_test_picture(asdict(self))

    def write(self, path: str | Path) -> None:
        """Write a page (``.html``) or a picture (``.png``).

        Raises:
            MissingExtraError: matplotlib or jinja2 is not installed.
        """
        write_range_test(asdict(self), Path(path))

    def __str__(self) -> str:
        return range_test_sentence(asdict(self))

    def _repr_html_(self) -> str:
        try:
            picture = self.figure()._repr_html_()
        except MissingExtraError:
            picture = self.table()._repr_html_()
        return fragment(picture, title=str(self))


def diverges(losses: Sequence[float]) -> bool:
    """Return whether the loss is no longer finite or has risen for good."""
    return _end(losses, _smooth(losses)) is not None


def _end(losses: Sequence[float], smoothed: Sequence[float]) -> int | None:
    """Return the number of steps before the divergence; None: there is none."""
    best = math.inf
    for number, (loss, mean) in enumerate(zip(losses, smoothed, strict=True)):
        best = min(best, mean)
        if not math.isfinite(loss):
            return number
        if mean > _DIVERGED * best and mean > smoothed[0]:
            return number + 1
    return None


def read_curve(rates: Sequence[float], losses: Sequence[float]) -> RangeTest:
    """Return the suggested and the steepest rate of a loss curve.

    Raises:
        SpecError: the loss is not finite, or diverges, within the first steps.
    """
    smoothed = _smooth(losses)
    end = _end(losses, smoothed)
    if end is not None and end < _FIRST:
        raise SpecError(
            f"range test: the loss is not finite, or diverges, from a rate of {rates[end]:.1e} on. Check the data "
            "and the source model."
        )
    diverged, stop = end is not None, len(losses) if end is None else end
    rates, losses, smoothed = rates[:stop], losses[:stop], smoothed[:stop]
    lowest = _end_of_minimum(losses, smoothed)
    # Up to the minimum, at steps with neighbours on both sides.
    falls = {i: smoothed[i - 1] - smoothed[i + 1] for i in range(1, max(2, min(lowest, stop - 1)))}
    steepest = rates[max(falls, key=falls.__getitem__)]
    return RangeTest(tuple(rates), tuple(losses), tuple(smoothed), _SHARE * rates[lowest], steepest, diverged)


def _end_of_minimum(losses: Sequence[float], smoothed: Sequence[float]) -> int:
    """Return the last step before the loss rises from its minimum by more than chance."""
    # A median, since the few steps of the rise itself do not measure chance.
    spread = 1.5 * statistics.median(abs(loss - mean) for loss, mean in zip(losses, smoothed, strict=True))
    chance = 2 * spread / math.sqrt(2 * math.sqrt(math.pi) * _WIDTH)  # over the steps that the Gaussian averages
    minimum = min(smoothed)
    step = smoothed.index(minimum)
    limit = minimum + max(chance, _FLAT * (smoothed[0] - minimum))
    while step + 1 < len(smoothed) and smoothed[step + 1] <= limit:
        step += 1
    return step


def _smooth(losses: Sequence[float]) -> list[float]:
    """Gaussian averages over neighbouring steps; an exploding loss counts no more than a diverged one."""
    values = torch.tensor(losses, dtype=torch.float64)
    limit = _DIVERGED * values[:_FIRST].nan_to_num(0, 0, 0).mean()
    values = values.nan_to_num(torch.inf, torch.inf, torch.inf).clamp(max=float(limit))
    steps = torch.arange(len(losses), dtype=torch.float64)
    weights = torch.exp(-((steps[:, None] - steps) ** 2) / (2 * _WIDTH**2))
    smoothed: list[float] = ((weights @ values) / weights.sum(1)).tolist()
    return smoothed
