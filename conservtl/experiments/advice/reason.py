"""A recommendation's parts: strategies, settings and the reasons for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["Advice", "Reason"]


@dataclass(frozen=True)
class Reason:
    """One choice and its reason.

    Args:
        what: features, side, amount, rates, conservation, norms, rate, length.
        reason: one sentence, with its numbers.
    """

    what: str
    reason: str


@dataclass(frozen=True)
class Advice:
    """Strategies and training settings.

    Args:
        strategies: as fields of a spec.
        training: the fields of ``training`` that are chosen.
        choices: the reasons.
    """

    strategies: tuple[dict[str, Any], ...]
    training: dict[str, Any]
    choices: tuple[Reason, ...]
