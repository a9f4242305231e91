"""The methods of a comparison, each with its look in every picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from conservtl.report.figures.canvas import GREY, INK
from conservtl.report.text.intervals import MeanInterval, difference_span, metric_span, time_span
from conservtl.report.text.metrics import ACCURACY, Metric

__all__ = ["VariantResult", "best_baseline", "best_method", "main_table", "variants"]

# Okabe and Ito's palette; shapes tell variants apart too.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_INKS = ("#0072B2", "#B34700", "#00704F", "#A0457B", "#8A6000", "#1F72A0")  # the same, dark enough for text
_SOFT = "#6B6B6B"
_SHAPES = ("o", "s", "^", "v", "P", "X")
_SIGNS = {"o": "●", "s": "■", "^": "▲", "v": "▼", "P": "✚", "X": "✖", "D": "◇"}


@dataclass(frozen=True)
class VariantResult:
    """One method with its results, in the shown unit, and its look.

    Args:
        name: its label.
        role: "source" (the source model unchanged), "baseline", "bound" (a baseline that uses source data, out of
            competition) or "method" (what the comparison asks about).
        best: whether it is the best baseline.
        wins: whether it beats the best baseline beyond chance.
        rank: a key that is largest for the best variant.
        difference: gain over the best baseline, positive if better.
    """

    name: str
    role: str
    best: bool
    wins: bool
    target: MeanInterval
    source: MeanInterval | None
    combined: MeanInterval | None
    rank: float
    constrained: float | None
    difference: MeanInterval | None
    seconds: MeanInterval | None
    per_target: Mapping[str, tuple[MeanInterval, MeanInterval]]
    colour: str
    ink: str
    shape: str

    @property
    def baseline(self) -> bool:
        """Whether methods are compared with it."""
        return self.role != "method"

    @property
    def untrained(self) -> bool:
        """Whether it is the unchanged source model."""
        return self.role == "source"

    @property
    def sign(self) -> str:
        """Its shape, for a table."""
        return _SIGNS[self.shape]

    @property
    def note(self) -> str:
        """A remark beneath its name."""
        if self.role == "bound":
            return "uses source data: an upper bound"
        return "the best baseline" if self.best else ""


def variants(table: Mapping[str, Any], metric: Metric = ACCURACY) -> list[VariantResult]:
    """Return the rows of a table that were measured on the target, in its order."""
    result: list[VariantResult] = []
    methods = 0
    for row in table.get("rows") or []:
        target, combined = metric_span(row.get("target"), metric), metric_span(row.get("harmonic"), metric)
        if target is None:
            continue
        best = row.get("id", row["variant"]) == table.get("best_baseline_id", table.get("best_baseline"))
        role = row.get("role") or _role_by_label(row)
        if role == "method":
            place = methods % len(_COLOURS)
            look = _COLOURS[place], _INKS[place], _SHAPES[(methods + methods // len(_SHAPES)) % len(_SHAPES)]
            methods += 1
        else:
            colours = (INK, INK) if best or role == "source" else (GREY, _SOFT)
            look = *colours, "D" if role == "source" else "o"
        sides = {
            str(name): (metric_span(pair.get("before"), metric), metric_span(pair.get("after"), metric))
            for name, pair in (row.get("per_target") or {}).items()
        }
        result.append(
            VariantResult(
                name=str(row["variant"]),
                role=role,
                best=best,
                wins=bool(row.get("wins")),
                target=target,
                source=metric_span(row.get("source"), metric),
                combined=combined,
                rank=metric.rank((combined or target).mean),
                constrained=row.get("constrained"),
                difference=difference_span(row.get("difference"), metric),
                seconds=time_span(row.get("seconds")),
                per_target={name: (a, b) for name, (a, b) in sides.items() if a is not None and b is not None},
                colour=look[0],
                ink=look[1],
                shape=look[2],
            )
        )
    return result


def _role_by_label(row: Mapping[str, Any]) -> str:
    """Return the role of a row that was written before rows had one: its label was its id."""
    own = {"source as it is": "source", "joint training": "bound"}
    return own.get(row["variant"], "baseline") if row["baseline"] else "method"


def best_method(rows: list[VariantResult]) -> VariantResult | None:
    """Return the best of the methods in question."""
    return max((row for row in rows if not row.baseline), key=lambda row: row.rank, default=None)


def best_baseline(rows: list[VariantResult]) -> VariantResult | None:
    """Return the baseline that every method is compared with."""
    return next((row for row in rows if row.best), None)


def main_table(result: Mapping[str, Any]) -> int:
    """Return the position of the table shown first: that of the spec's number of shots, else the last."""
    shots = ((result.get("spec") or {}).get("data") or {}).get("shots")
    tables = result["tables"]
    return next((place for place, table in enumerate(tables) if table["shots"] == shots), len(tables) - 1)
