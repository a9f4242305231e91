"""Labelled recordings of several speakers, and how they become the two domains of a run."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from conservtl.data import Augmentation, Domains, Examples, Preprocessing, carve, draw_shots
from conservtl.errors import DataError

__all__ = ["Protocol", "Recording", "domains"]

_SHOWN = 12  # speakers or words named in a message


@dataclass(frozen=True)
class Recording:
    """One spoken word.

    Args:
        name: what a person can find it by: its file, or its voice and word.
        label: the word.
        speaker: who says it.
        held_out: kept away from source training, to measure what is kept.
    """

    name: str
    label: str
    speaker: str
    held_out: bool = False


@dataclass(frozen=True)
class Protocol:
    """Who adapts, on how much, and who is the source.

    Args:
        target: the speaker to adapt to.
        shots: recordings a word to adapt with.
        validation: part of the shots to validate on.
        seed: draws the shots.
        source_speakers: the source's speakers; all but the target where None.
        limit: most source recordings a word to train on, and to test on; all where None.
        source: False leaves the source's recordings unread.
    """

    target: str
    shots: int
    validation: float
    seed: int
    source_speakers: tuple[str, ...] | None = None
    limit: int | None = None
    source: bool = True


def domains(
    found: Sequence[Recording],
    protocol: Protocol,
    read: Callable[[Sequence[Recording]], Tensor],
    preprocessing: Preprocessing,
    augmentation: Augmentation | None,
    source_augmentation: Augmentation | None,
) -> Domains:
    """Split recordings into the target's shots and test part and the source's training and held-out part.

    Args:
        found: all recordings, of all speakers.
        protocol: who adapts and on how much.
        read: inputs for some of them, (N, ...).
        preprocessing: handed on.
        augmentation: handed on, for the shots.
        source_augmentation: handed on, for training the source.

    Raises:
        DataError: the target is not among the speakers, lacks a word, or has too few recordings of one;
            no other speaker is there; a word has no recording to train the source on.
    """
    target = [r for r in found if r.speaker == protocol.target]
    if not target:
        raise DataError(
            f"data.target: no recording is of speaker {protocol.target!r}. Name one of those found: "
            f"{_listed({r.speaker for r in found})}."
        )
    source = _of_source(found, protocol)
    labels, source_labels = _labels(target, source)
    _enough(target, protocol.shots)

    position = [labels.index(r.label) for r in target]
    shots, rest = draw_shots(position, protocol.shots, protocol.seed)
    train, held = carve([position[i] for i in shots], protocol.validation, protocol.seed)
    own = _examples(target, labels, read)
    adapting = own.take(shots)

    training = testing = None
    if protocol.source:
        learned = _limited([r for r in source if not r.held_out], protocol.limit)
        kept = _limited([r for r in source if r.held_out], protocol.limit)
        _covered(learned, source_labels)
        inputs = _examples(learned + kept, source_labels, read)
        training = inputs.take(range(len(learned)))
        testing = inputs.take(range(len(learned), len(inputs))) if kept else None
    return Domains(
        labels=labels,
        source_labels=source_labels,
        shots=adapting.take(train),
        validation=adapting.take(held) if held else None,
        target_test=own.take(rest),
        source_train=training,
        source_test=testing,
        preprocessing=preprocessing,
        augmentation=augmentation,
        source_augmentation=source_augmentation,
    )


def _of_source(found: Sequence[Recording], protocol: Protocol) -> list[Recording]:
    others = {r.speaker for r in found} - {protocol.target}
    wanted = others if protocol.source_speakers is None else set(protocol.source_speakers)
    if protocol.target in wanted:
        raise DataError(
            f"data.source_speakers: source and target are disjoint, and the target {protocol.target!r} is "
            f"listed. Take it out of the list."
        )
    if missing := wanted - others:
        raise DataError(
            f"data.source_speakers: no recording is of {_listed(missing)}. Name some of those found: {_listed(others)}."
        )
    if not wanted and protocol.source:
        raise DataError(
            f"data.target: {protocol.target!r} is the only speaker, and a source model needs others to train "
            f"on. Add recordings of other speakers, or start from weights of your own."
        )
    return [r for r in found if r.speaker in wanted]


def _labels(target: Sequence[Recording], source: Sequence[Recording]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    own, others = {r.label for r in target}, {r.label for r in source}
    if lacking := others - own:
        raise DataError(
            f"data.target: {target[0].speaker!r} has no recording of {_listed(lacking)}, which the source "
            f"speakers say. Record them, or list in data.words only what everybody says: {_listed(own)}."
        )
    return tuple(sorted(own)), tuple(sorted(others or own))


def _enough(target: Sequence[Recording], shots: int) -> None:
    for label in sorted({r.label for r in target}):
        count = sum(r.label == label for r in target)
        if count <= shots:
            raise DataError(
                f"data.shots: {target[0].speaker!r} has {count} recordings of {label!r}; {shots} to adapt "
                f"with leave none to test on. Ask for at most {count - 1} shots, or record more."
            )


def _covered(learned: Sequence[Recording], labels: Sequence[str]) -> None:
    if missing := set(labels) - {r.label for r in learned}:
        raise DataError(
            f"data: all the source's recordings of {_listed(missing)} are held out, so none is left to train "
            f"on. Hold out fewer takes (data.held_out_takes or data.held_out)."
        )


def _limited(recordings: list[Recording], limit: int | None) -> list[Recording]:
    """At most ``limit`` recordings a word: those whose names hash lowest, so speakers are mixed."""
    if limit is None:
        return recordings
    kept: set[Recording] = set()
    for label in {r.label for r in recordings}:
        kept |= set(sorted((r for r in recordings if r.label == label), key=_digest)[:limit])
    return [r for r in recordings if r in kept]


def _digest(recording: Recording) -> str:
    """Independent of the folder the recordings lie in."""
    own = f"{recording.label}/{recording.speaker}/{Path(recording.name).name}"
    return hashlib.sha256(own.encode()).hexdigest()


def _examples(
    recordings: Sequence[Recording],
    labels: Sequence[str],
    read: Callable[[Sequence[Recording]], Tensor],
) -> Examples:
    at = torch.tensor([labels.index(r.label) for r in recordings], dtype=torch.long)
    return Examples(read(recordings), at, tuple(r.name for r in recordings))


def _listed(names: set[str]) -> str:
    shown = ", ".join(repr(name) for name in sorted(names)[:_SHOWN])
    return shown + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "") if names else "none"
