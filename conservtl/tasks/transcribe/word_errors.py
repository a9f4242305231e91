"""Word and character errors of hypotheses, counted by jiwer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from conservtl.extras import require

__all__ = ["Errors", "changed_words", "character_errors", "word_errors"]


@dataclass(frozen=True)
class Errors:
    """Errors of hypotheses, summed.

    Args:
        substitutions: tokens of the reference that another stands for.
        deletions: tokens of the reference that are missing.
        insertions: tokens too many.
        count: tokens of the reference.
    """

    substitutions: int
    deletions: int
    insertions: int
    count: int

    @property
    def wrong(self) -> int:
        """Return all errors."""
        return self.substitutions + self.deletions + self.insertions

    @property
    def rate(self) -> float:
        """Return the errors as a share of the reference; NaN without one."""
        return self.wrong / self.count if self.count else float("nan")


def word_errors(references: Sequence[str], hypotheses: Sequence[str]) -> Errors:
    """Return the word errors, pooled over pairs of texts."""
    return _pooled(require("jiwer", "transcribe").process_words(list(references), list(hypotheses)))


def character_errors(references: Sequence[str], hypotheses: Sequence[str]) -> Errors:
    """Return the character errors, spaces included, pooled over pairs of texts."""
    return _pooled(require("jiwer", "transcribe").process_characters(list(references), list(hypotheses)))


def changed_words(references: Sequence[str], hypotheses: Sequence[str]) -> Counter[tuple[str, str]]:
    """Return how often each word became another: (reference, hypothesis) -> count, "" where one is missing."""
    jiwer = require("jiwer", "transcribe")
    counts: Counter[tuple[str, str]] = Counter()
    for reference, hypothesis in zip(references, hypotheses, strict=True):
        done = jiwer.process_words(reference, hypothesis)
        said, heard = done.references[0], done.hypotheses[0]
        for chunk in done.alignments[0]:
            of_said = said[chunk.ref_start_idx : chunk.ref_end_idx]
            of_heard = heard[chunk.hyp_start_idx : chunk.hyp_end_idx]
            if chunk.type == "substitute":
                counts.update(zip(of_said, of_heard, strict=True))
            elif chunk.type == "delete":
                counts.update((word, "") for word in of_said)
            elif chunk.type == "insert":
                counts.update(("", word) for word in of_heard)
    return counts


def _pooled(done: Any) -> Errors:
    count = done.hits + done.substitutions + done.deletions
    return Errors(done.substitutions, done.deletions, done.insertions, count)
