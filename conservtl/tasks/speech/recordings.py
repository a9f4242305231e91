"""Split of labelled recordings of several speakers into the two domains of a run."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from unicodedata import normalize

import torch
from torch import Tensor

from conservtl.data import Augmentation, Domains, Examples, Preprocessing, carve, draw_shots
from conservtl.data.shots import Shots
from conservtl.errors import DataError, counted, listed
from conservtl.tasks.audio.speakers import check_sources, check_target
from conservtl.tasks.bad_files import shown_name

__all__ = ["Protocol", "Recording", "domains", "find_copies"]


@dataclass(frozen=True)
class Recording:
    """A recording of one word.

    Args:
        name: its file, or its voice, word and take.
        label: the word.
        speaker: the speaker.
        held_out: whether it belongs to the source's test part.
        take: its number among those of its word and speaker.
    """

    name: str
    label: str
    speaker: str
    held_out: bool = False
    take: int = 0


@dataclass(frozen=True)
class Protocol:
    """Rules of the split into target and source.

    Args:
        target: the target speaker.
        shots: recordings of each word for adaptation: a number, "all" or up to a most. The last two leave one of each
            word that has two.
        validation: share of the shots for validation.
        seed: draws the shots.
        source_speakers: the source's speakers; None for all but the target.
        limit: largest number of source recordings of each word, for training and testing each; None for all.
        source: whether to read the source's recordings.
    """

    target: str
    shots: Shots
    validation: float
    seed: int
    source_speakers: tuple[str, ...] | None = None
    limit: int | None = None
    source: bool = True


def domains(
    recordings: Sequence[Recording],
    protocol: Protocol,
    read: Callable[[Sequence[Recording]], Tensor],
    preprocessing: Preprocessing,
    augmentation: Augmentation | None,
    source_augmentation: Augmentation | None,
    proxies: Augmentation | None = None,
) -> Domains:
    """Split recordings into the target's shots and test part and the source's training and test parts.

    Raises:
        DataError: the target is not among the speakers, lacks a word, or has too few recordings of a word; there is
            no other speaker; a word has no recording to train the source on.
    """
    target = [r for r in recordings if r.speaker == protocol.target]
    check_target(protocol.target, {r.speaker for r in recordings})
    source = _of_source(recordings, protocol)
    labels, source_labels = _labels(target, source)
    _check_shots(target, protocol.shots)

    classes = [labels.index(r.label) for r in target]
    shots, rest = draw_shots(classes, protocol.shots, protocol.seed)
    train, validation = carve([classes[i] for i in shots], protocol.validation, protocol.seed)
    examples = _examples(target, labels, read)
    shot_examples = examples.take(shots)

    source_train = source_test = None
    if protocol.source:
        trained = _limited([r for r in source if not r.held_out], protocol.limit)
        tested = _limited([r for r in source if r.held_out], protocol.limit)
        _check_source_words(trained, source_labels)
        both = _examples(trained + tested, source_labels, read)
        source_train = both.take(range(len(trained)))
        source_test = both.take(range(len(trained), len(both))) if tested else None
    return Domains(
        labels=labels,
        source_labels=source_labels,
        shots=shot_examples.take(train),
        validation=shot_examples.take(validation) if validation else None,
        target_test=examples.take(rest),
        source_train=source_train,
        source_test=source_test,
        preprocessing=preprocessing,
        augmentation=augmentation,
        source_augmentation=source_augmentation,
        proxies=proxies,
    )


def find_copies(recordings: Sequence[Recording], digests: Mapping[str, str], target: str) -> tuple[str, ...]:
    """Return remarks on recordings that are in the source's training part twice; refuse any other copy.

    Two recordings of the target with the same samples could be a shot and a test example, and one of the source could
    be trained and tested on. Digests are of those recordings that were read.

    Raises:
        DataError: two recordings have the same samples, and are not both in the source's training part with one label.
    """
    groups: dict[str, list[Recording]] = defaultdict(list)
    for recording in recordings:
        if recording.name in digests:
            groups[digests[recording.name]].append(recording)
    copies = [group for group in groups.values() if len(group) > 1]
    harmful = [
        group
        for group in copies
        if len({r.label for r in group}) > 1 or any(r.speaker == target or r.held_out for r in group)
    ]
    if harmful:
        first, second = harmful[0][:2]
        more = f" ({counted(len(harmful) - 1, 'further recording')} too)" if len(harmful) > 1 else ""
        raise DataError(
            f"data: every recording must be there once, or a model is tested on what it is trained on; "
            f"{shown_name(second.name)} has the same samples as {shown_name(first.name)}{more}. Remove the copies."
        )
    count = sum(len(group) - 1 for group in copies)
    return (f"copies in the source's training part: {counted(count, 'recording')}",) if count else ()


def _of_source(recordings: Sequence[Recording], protocol: Protocol) -> list[Recording]:
    known = {r.speaker for r in recordings}
    check_sources({"data.source_speakers": protocol.source_speakers or ()}, protocol.target, known)
    wanted = known - {protocol.target} if protocol.source_speakers is None else set(protocol.source_speakers)
    if not wanted and protocol.source:
        raise DataError(
            f"data.target must not be the only speaker, because a source model is trained on others; received "
            f"{protocol.target!r}. Add recordings of other speakers, or start from existing weights."
        )
    return [r for r in recordings if r.speaker in wanted]


def _labels(target: Sequence[Recording], source: Sequence[Recording]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    words, source_words = {r.label for r in target}, {r.label for r in source}
    if missing := source_words - words:
        raise DataError(
            f"data.target: {target[0].speaker!r} has no recording of {listed(sorted(missing))}, which the source "
            f"speakers say. Record them, or set data.words to the words of the target: {listed(sorted(words))}."
        )
    return tuple(sorted(words)), tuple(sorted(source_words or words))


def _check_shots(target: Sequence[Recording], shots: Shots) -> None:
    if not isinstance(shots, int):
        return
    for label in sorted({r.label for r in target}):
        count = sum(r.label == label for r in target)
        if count <= shots:
            raise DataError(
                f"data.shots: {target[0].speaker!r} has {counted(count, 'recording')} of {label!r}; "
                f"{counted(shots, 'shot', 'leaves')} none for testing. Set data.shots to at most {count - 1} or "
                f"to {{up_to: {shots}}}, or record more."
            )


def _check_source_words(trained: Sequence[Recording], labels: Sequence[str]) -> None:
    if missing := set(labels) - {r.label for r in trained}:
        raise DataError(
            f"data: all of the source's recordings of {listed(sorted(missing))} are held out, which leaves none for "
            f"training. Hold out fewer takes (data.held_out_takes or data.held_out)."
        )


def _limited(recordings: list[Recording], limit: int | None) -> list[Recording]:
    """Return at most ``limit`` recordings of each word: those with the lowest hash, which mixes speakers."""
    if limit is None:
        return recordings
    chosen: set[Recording] = set()
    for label in {r.label for r in recordings}:
        chosen |= set(sorted((r for r in recordings if r.label == label), key=_digest)[:limit])
    return [r for r in recordings if r in chosen]


def _digest(recording: Recording) -> str:
    """Return a hash that is independent of the recordings' folder."""
    key = f"{recording.label}/{recording.speaker}/{Path(recording.name).name}"
    return hashlib.sha256(normalize("NFC", key).encode()).hexdigest()


def _examples(
    recordings: Sequence[Recording],
    labels: Sequence[str],
    read: Callable[[Sequence[Recording]], Tensor],
) -> Examples:
    classes = torch.tensor([labels.index(r.label) for r in recordings], dtype=torch.long)
    return Examples(read(recordings), classes, tuple(r.name for r in recordings))
