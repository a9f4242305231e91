"""Files to predict in batches of similar length, read one batch ahead."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any, TypeVar

from conservtl.errors import DataError, counted

__all__ = ["batches_by_length", "durations", "read_ahead", "speed_text"]

Content = TypeVar("Content")

_SECONDS = 20.0  # of a batch at most, its padding included, for each of the files that it may have


def durations(preprocessing: Any, files: Sequence[Path]) -> list[float] | None:
    """Return the duration of each file in seconds, 0 for one that cannot be read; None: files have no duration."""
    measure = getattr(preprocessing, "seconds", None)
    return None if measure is None else [_duration(measure, file) for file in files]


def batches_by_length(seconds: Sequence[float], most: int) -> list[list[int]]:
    """Return the positions of each batch, short files first; fewer of long ones, which bounds its padded duration."""
    batches: list[list[int]] = []
    for place in sorted(range(len(seconds)), key=lambda place: seconds[place]):
        full = not batches or len(batches[-1]) == most
        if full or (len(batches[-1]) + 1) * seconds[place] > most * _SECONDS:
            batches.append([])
        batches[-1].append(place)
    return batches


def read_ahead(executor: Executor, reads: Sequence[Callable[[], Content]]) -> Iterator[Content]:
    """Return an iterator over contents; the next one is read while its user works with the one before."""
    ahead = executor.submit(reads[0]) if reads else None
    for following in (*reads[1:], None):
        if ahead is None:
            return
        content = ahead.result()
        ahead = None if following is None else executor.submit(following)
        yield content


def speed_text(preprocessing: Any, files: Sequence[Path], elapsed: float) -> str:
    """Return how long files took beside their duration; empty where they have none."""
    total = sum(durations(preprocessing, files) or ())
    if not total:
        return ""
    return f"{counted(len(files), 'file')}, {total:,.1f} s, in {elapsed:,.1f} s: real-time factor {elapsed / total:.3g}"


def _duration(measure: Callable[[Path], float], file: Path) -> float:
    try:
        return measure(file)
    except DataError:  # reading it says why
        return 0.0
