"""Transcripts of recordings that are longer than an utterance: overlapping windows, joined."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Any

import torch

from conservtl.tasks.transcribe.decoding import frames_of

__all__ = ["OVERLAP", "WINDOW", "joined_frames", "joined_words"]

WINDOW = 30.0
"""Duration of a window in seconds, and the longest recording that is read as a whole."""
OVERLAP = 0.2
"""Share of a window that the next one has too."""

Span = tuple[float, float]


def joined_frames(outputs: Sequence[Any], spans: Sequence[Span]) -> Any:
    """Return the outputs of CTC for a recording: frames of its windows, cut at the middle of each overlap.

    Outputs are (logits (1, frames, tokens), lengths (1,)) of each window, spans (start, end) in seconds.
    """
    cuts = [(start + end) / 2 for (start, _), (_, end) in zip(spans[1:], spans, strict=False)]
    parts = []
    for place, (output, (start, end)) in enumerate(zip(outputs, spans, strict=True)):
        logits, lengths = frames_of(output)
        frames = int(lengths[0])
        first = int((cuts[place - 1] - start) / (end - start) * frames) if place else 0
        last = int((cuts[place] - start) / (end - start) * frames) if place < len(cuts) else frames
        parts.append(logits[:, first:last])
    joined = torch.cat(parts, 1)
    return joined, torch.tensor([joined.shape[1]])


def joined_words(texts: Sequence[str], overlap: float = OVERLAP) -> str:
    """Return the text of a recording: those of its windows, joined at the middle of the longest run of equal words.

    The run is looked for in the last words of one text and the first of the next, twice as many as the overlap's share.
    Texts without a word in common there follow each other.

    Args:
        texts: of the windows, in order.
        overlap: share of a window that the next one has too.

    >>> joined_words(["one two three four", "three four five six"], overlap=0.5)
    'one two three four five six'
    """
    words: list[str] = []
    before = 0  # words of the text before
    for text in texts:
        new = text.split()
        tail = min(ceil(2 * overlap * before), len(words))
        head = ceil(2 * overlap * len(new))
        at = len(words) - tail
        size, first, second = _longest_run(words[at:], new[:head])
        kept, skipped = (at + first + size // 2, second + size // 2) if size else (len(words), 0)
        words, before = words[:kept] + new[skipped:], len(new)
    return " ".join(words)


def _longest_run(first: Sequence[str], second: Sequence[str]) -> tuple[int, int, int]:
    """Return the size of the longest run of words in both, and where it begins in each.

    Of several the last in the first text, and of those the first in the second: fewest words are left out.
    """
    best = (0, 0, 0)
    above = [0] * len(second)
    for place, word in enumerate(first):
        sizes = [(above[other - 1] if other else 0) + 1 if word == each else 0 for other, each in enumerate(second)]
        for other, size in enumerate(sizes):
            best = max(best, (size, place - size + 1, -(other - size + 1)) if size else best)
        above = sizes
    return best[0], best[1], -best[2]
