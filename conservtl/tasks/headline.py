"""The metric that a task is judged by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["Headline"]


@dataclass(frozen=True)
class Headline:
    """The metric that a task is judged by.

    Args:
        metric: its key in the task's metrics.
        better: which direction is better.
        share: whether it is a share of 1, written in per cent; a score that combines both domains, and the
            constrained score, are defined for shares only.
        text: its name in a sentence; the key if empty.
    """

    metric: str = "accuracy"
    better: Literal["higher", "lower"] = "higher"
    share: bool = True
    text: str = ""

    @property
    def label(self) -> str:
        """Its name in a sentence."""
        return self.text or self.metric.replace("_", " ")

    def show(self, value: float) -> str:
        """Return a value as text, a share in per cent."""
        return f"{100 * value:.1f} %" if self.share else f"{value:.3g}"

    def as_json(self) -> dict[str, Any]:
        """Return what a report needs to write and to judge it."""
        return {"key": self.metric, "name": self.label, "better": self.better, "share": self.share}
