"""Utterances that are in a data set twice: as a file, a copy of it, or stretches of a file that overlap."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from conservtl.errors import DataError
from conservtl.storage.files import file_digest
from conservtl.tasks.audio.reading import digest
from conservtl.tasks.bad_files import shown_name
from conservtl.tasks.transcribe.recordings import read_utterance
from conservtl.tasks.transcribe.utterances import Utterance

__all__ = ["check_shared"]

_SHARED = 0.5  # of the shorter of two stretches; neighbours may overlap by less


def check_shared(utterances: Sequence[Utterance], where: Mapping[str, str]) -> None:
    """Raise if an utterance is there twice, and name both lines: a model would be tested on what it is trained on."""
    in_files = [one for one in utterances if one.file is not None]
    for first, second, reason in (*_stretches(in_files), *_same_samples(in_files)):
        raise DataError(
            f"{where[second.name]}: every utterance must be there once, or a model is tested on what it is trained on; "
            f"{shown_name(second.name)} {reason} {shown_name(first.name)}, {where[first.name]}. Remove one of them."
        )


def _stretches(utterances: Sequence[Utterance]) -> Iterator[tuple[Utterance, Utterance, str]]:
    """Yield two stretches of a file, or of files with the same bytes, that share most of the shorter one."""
    of_file: dict[str, list[Utterance]] = defaultdict(list)
    contents = _contents({one.file for one in utterances if one.file is not None})
    for one in utterances:
        if one.file is not None:
            of_file[contents.get(one.file, str(one.file))].append(one)
    for ones in of_file.values():
        for first, second in pairwise(sorted(ones, key=lambda one: (one.offset, one.seconds))):
            overlap = min(first.offset + first.seconds, second.offset + second.seconds) - second.offset
            if overlap > _SHARED * min(first.seconds, second.seconds):
                copied = first.file != second.file
                yield first, second, "is a copy of" if copied else "shares most of its recording with"


def _same_samples(utterances: Sequence[Utterance]) -> Iterator[tuple[Utterance, Utterance, str]]:
    """Yield two utterances with the same speaker, text, duration and samples: copies in other formats, or cut out."""
    alike: dict[tuple[str, str, float], list[Utterance]] = defaultdict(list)
    for one in utterances:
        alike[one.speaker, one.text, round(one.seconds, 3)].append(one)
    for ones in alike.values():
        heard: dict[str, Utterance] = {}
        for one in ones if len(ones) > 1 else ():
            try:
                first = heard.setdefault(digest(*read_utterance(one)), one)
            except DataError:  # a bad file, which is named as one
                continue
            if first is not one:
                yield first, one, "has the samples of"


def _contents(files: Iterable[Path]) -> dict[Path, str]:
    """Return a digest of each file that has the size of another."""
    of_size: dict[int, list[Path]] = defaultdict(list)
    for file in files:
        of_size[file.stat().st_size].append(file)
    return {file: file_digest(file) for same in of_size.values() if len(same) > 1 for file in same}
