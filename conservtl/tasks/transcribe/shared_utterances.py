"""Utterances that are in a data set twice: as a file, a copy of it, or stretches of a file that overlap."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from conservtl.errors import DataError
from conservtl.storage.files import file_digest
from conservtl.tasks.bad_files import shown_name
from conservtl.tasks.transcribe.utterances import Utterance

__all__ = ["check_shared"]

_SHARED = 0.5  # of the shorter of two stretches; neighbours may overlap by less


def check_shared(utterances: Sequence[Utterance], where: Mapping[str, str]) -> None:
    """Raise if an utterance is there twice, and name both lines: a model would be tested on what it is trained on."""
    of_file: dict[str, list[Utterance]] = defaultdict(list)
    contents = _contents({one.file for one in utterances if one.file is not None})
    for one in utterances:
        if one.file is not None:
            of_file[contents.get(one.file, str(one.file))].append(one)
    for ones in of_file.values():
        for first, second in pairwise(sorted(ones, key=lambda one: (one.offset, one.seconds))):
            overlap = min(first.offset + first.seconds, second.offset + second.seconds) - second.offset
            if overlap > _SHARED * min(first.seconds, second.seconds):
                reason = "is a copy of" if first.file != second.file else "shares most of its recording with"
                raise DataError(
                    f"{where[second.name]}: every utterance must be there once, or a model is tested on what it is "
                    f"trained on; {shown_name(second.name)} {reason} {shown_name(first.name)}, {where[first.name]}. "
                    "Remove one of them."
                )


def _contents(files: Iterable[Path]) -> dict[Path, str]:
    """Return a digest of each file that has the size of another."""
    of_size: dict[int, list[Path]] = defaultdict(list)
    for file in files:
        of_size[file.stat().st_size].append(file)
    return {file: file_digest(file) for same in of_size.values() if len(same) > 1 for file in same}
