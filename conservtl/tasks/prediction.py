"""The answer for one file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from conservtl.tasks.bad_files import shown_name

__all__ = ["Prediction"]


@dataclass(frozen=True)
class Prediction:
    """The model's answer for one file.

    Args:
        file: the file.
        label: the most probable label; a transcript or a number as text for a task without classes.
        probability: of that answer, in [0, 1]; None where the task gives none.
    """

    file: Path
    label: str
    probability: float | None = None

    def __str__(self) -> str:
        parts = [shown_name(self.file), shown_name(self.label)]
        return "\t".join(parts if self.probability is None else [*parts, f"{self.probability:.3f}"])
