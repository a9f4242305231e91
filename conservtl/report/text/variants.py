"""The rows of a comparison, with the look that each has in every picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from conservtl.report.figures.canvas import GREY, INK
from conservtl.report.text.intervals import Span, points, seconds, share

__all__ = ["ORIGIN", "Variant", "best_baseline", "best_own", "main_table", "variants"]

ORIGIN = "source as it is"
_BOUND = "joint training"

# Okabe and Ito's palette; shapes tell variants apart too.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_INKS = ("#0072B2", "#B34700", "#00704F", "#A0457B", "#8A6000", "#1F72A0")  # the same, dark enough for text
_SOFT = "#6B6B6B"
_SHAPES = ("o", "s", "^", "v", "P", "X")
_SIGNS = {"o": "●", "s": "■", "^": "▲", "v": "▼", "P": "✚", "X": "✖", "D": "◇"}


@dataclass(frozen=True)
class Variant:
    """One method: what came of it, in per cent and points, and how it is drawn."""

    name: str
    baseline: bool
    best: bool
    wins: bool
    target: Span
    source: Span | None
    harmonic: Span | None
    constrained: float | None
    difference: Span | None
    seconds: Span | None
    per_target: Mapping[str, tuple[Span, Span]]
    colour: str
    ink: str
    shape: str

    @property
    def score(self) -> Span:
        """What decides: the harmonic mean, or the target where there is no source to measure."""
        return self.harmonic or self.target

    @property
    def sign(self) -> str:
        """Its shape, for a table."""
        return _SIGNS[self.shape]

    @property
    def note(self) -> str:
        """What is to be known about it."""
        if self.name == _BOUND:
            return "uses source data: an upper bound"
        return "the best baseline" if self.best else ""


def variants(table: Mapping[str, Any]) -> list[Variant]:
    """One for each row that was measured on the target, in the table's order."""
    found, own = [], 0
    for row in table.get("rows") or []:
        target = share(row.get("target"))
        if target is None:
            continue
        if row.get("baseline"):
            dark = row["variant"] in (ORIGIN, table.get("best_baseline"))
            colour, ink = (INK, INK) if dark else (GREY, _SOFT)
            shape = "D" if row["variant"] == ORIGIN else "o"
        else:
            colour, ink, shape = _COLOURS[own % 6], _INKS[own % 6], _SHAPES[(own + own // 6) % 6]
            own += 1
        sides = {
            str(name): (share(pair.get("before")), share(pair.get("after")))
            for name, pair in (row.get("per_target") or {}).items()
        }
        found.append(
            Variant(
                name=str(row["variant"]),
                baseline=bool(row.get("baseline")),
                best=row["variant"] == table.get("best_baseline"),
                wins=bool(row.get("wins")),
                target=target,
                source=share(row.get("source")),
                harmonic=share(row.get("harmonic")),
                constrained=row.get("constrained"),
                difference=points(row.get("difference")),
                seconds=seconds(row.get("seconds")),
                per_target={name: (a, b) for name, (a, b) in sides.items() if a is not None and b is not None},
                colour=colour,
                ink=ink,
                shape=shape,
            )
        )
    return found


def best_own(rows: list[Variant]) -> Variant | None:
    """The best of what is asked about."""
    return max((row for row in rows if not row.baseline), key=lambda row: row.score.mean, default=None)


def best_baseline(rows: list[Variant]) -> Variant | None:
    """What every method is held against."""
    return next((row for row in rows if row.best), None)


def main_table(result: Mapping[str, Any]) -> int:
    """Place of the table that stands first on the page: at the spec's own number of shots, else the last."""
    own = ((result.get("spec") or {}).get("data") or {}).get("shots")
    tables = result["tables"]
    return next((place for place, table in enumerate(tables) if table["shots"] == own), len(tables) - 1)
