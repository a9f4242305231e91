"""Word and character errors of hypotheses, counted by jiwer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

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
    return _pooled(require("jiwer", "transcribe").process_words, references, hypotheses)


def character_errors(references: Sequence[str], hypotheses: Sequence[str]) -> Errors:
    """Return the character errors, spaces included, pooled over pairs of texts."""
    return _pooled(require("jiwer", "transcribe").process_characters, references, hypotheses)


def changed_words(references: Sequence[str], hypotheses: Sequence[str]) -> Counter[tuple[str, str]]:
    """Return how often each word became another: (reference, hypothesis) -> count, "" where one is missing."""
    jiwer = require("jiwer", "transcribe")
    counts: Counter[tuple[str, str]] = Counter()
    for reference, hypothesis in zip(references, hypotheses, strict=True):
        if not reference:
            counts.update(("", word) for word in hypothesis.split())
            continue
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


def _pooled(process: object, references: Sequence[str], hypotheses: Sequence[str]) -> Errors:
    pairs = [pair for pair in zip(references, hypotheses, strict=True) if pair[0]]
    inserted = sum(_size(process, heard) for said, heard in zip(references, hypotheses, strict=True) if not said)
    if not pairs:
        return Errors(0, 0, inserted, 0)
    done = process([said for said, _ in pairs], [heard for _, heard in pairs])  # type: ignore[operator]
    count = done.hits + done.substitutions + done.deletions
    return Errors(done.substitutions, done.deletions, done.insertions + inserted, count)


def _size(process: object, text: str) -> int:
    return len(text.split()) if getattr(process, "__name__", "") == "process_words" else len(text)
