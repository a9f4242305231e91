"""Answers that an adaptation turned better or worse, and whether that is more than chance."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from conservtl.errors import counted

__all__ = ["Turned", "turned", "turned_notes"]

_LEVEL, _SMALL = 0.05, 0.001


@dataclass(frozen=True)
class Turned:
    """Examples of a test part whose answer changed.

    Args:
        better: whose answer is better than before.
        worse: whose answer is worse.
        of: all examples.
    """

    better: int
    worse: int
    of: int

    @property
    def p(self) -> float:
        """Return the probability of a difference as large if better and worse were equally likely: a sign test.

        Reference:
            McNemar, "Note on the sampling error of the difference between correlated proportions or percentages",
            Psychometrika 12, 1947; the exact form.
        """
        changed = self.better + self.worse
        tail = sum(math.comb(changed, k) for k in range(min(self.better, self.worse) + 1))
        return min(1.0, 2 * tail / (1 << changed))

    @property
    def within_chance(self) -> bool:
        """Return whether the difference is not significant at 5 %."""
        return self.p > _LEVEL

    def text(self, example: str) -> str:
        """Return the numbers in words."""
        worse = f"{self.worse:,}" if self.worse else "none"
        return f"of {counted(self.of, example)} {self.better:,} became better and {worse} worse"


def turned(report: Mapping[str, Any], domain: str) -> Turned | None:
    """Return the answers that changed on a domain; None where examples were not judged one by one."""
    given = (report.get("turned") or {}).get(domain)
    return Turned(**given) if given else None


def turned_notes(report: Mapping[str, Any]) -> list[str]:
    """Return a sentence on the answers that changed on each domain."""
    example, notes = str(report.get("example") or "example"), []
    for domain in ("target", "source"):
        if (found := turned(report, domain)) is not None:
            judged = "within chance" if found.within_chance else "more than chance"
            p = f"p = {found.p:.2g}" if found.p >= _SMALL else f"p < {_SMALL}"
            notes.append(f"{domain.capitalize()}: {found.text(example)}: {judged} (sign test, {p}).")
    return notes
