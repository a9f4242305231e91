"""Utterances of several speakers, split into the two domains of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from conservtl.data.sequences import Sequences
from conservtl.errors import DataError, agreeing, counted
from conservtl.tasks.audio.speakers import check_sources, check_target
from conservtl.tasks.speech.folder import in_held_out_part

__all__ = ["Part", "Split", "Utterance", "split_utterances"]

Part = Literal["train", "dev", "test"]


@dataclass(frozen=True)
class Utterance:
    """An utterance with its text.

    Args:
        name: unique; of a file below the root, with its offset if it has one.
        text: normalised; empty: it is not known, or not to be read.
        speaker: the speaker.
        seconds: its duration.
        file: the recording; None: it is made up.
        offset: start of the utterance in the file, in seconds.
        part: the official part it belongs to; None: there is none.
        rate: sample rate of the recording in Hz; None: not known.
    """

    name: str
    text: str
    speaker: str
    seconds: float
    file: Path | None = None
    offset: float = 0.0
    part: Part | None = None
    rate: int | None = None


@dataclass(frozen=True)
class Split:
    """Utterances by their use in a run.

    Args:
        shots: of the target, to train on.
        validation: of the target, to select on.
        target_test: of the target, to test on.
        source_train: of other speakers, to train a source model on.
        source_test: of other speakers, to measure what is kept.
        unlabelled: of the target, to train on without their texts, which are empty.
    """

    shots: list[Utterance]
    validation: list[Utterance]
    target_test: list[Utterance]
    source_train: list[Utterance]
    source_test: list[Utterance]
    unlabelled: list[Utterance] = field(default_factory=list)


def split_utterances(
    utterances: Sequence[Utterance],
    target: str,
    *,
    shots: int,
    validation: float,
    seed: int,
    source_speakers: Sequence[str] | None = None,
    held_out_speakers: Sequence[str] = (),
    held_out: float = 0.1,
    unlabelled: int | Literal["all"] = 0,
) -> Split:
    """Split utterances into the target's shots and test part, and the source's training and test parts.

    Official parts of a domain are kept, where it has both (``_official``): shots come from the target's training part,
    and its test part is tested on. Else the shots are drawn from all of the target's, and a share ``held_out`` of the
    source's utterances, by their names' hashes, is tested on; so are ``held_out_speakers``. Unlabelled are the target's
    utterances that have no text first, then others that are neither shots nor of an official test part.

    Raises:
        DataError: a speaker is unknown, or has too few utterances.
    """
    known = sorted({one.speaker for one in utterances})
    check_target(target, known)
    own = [one for one in utterances if one.speaker == target]
    named = {"data.source_speakers": source_speakers or (), "data.held_out_speakers": held_out_speakers}
    check_sources(named, target, known)
    texted = [one for one in own if one.text]
    trained, left, tested = _of_target(target, texted, shots, seed)
    bare = _unlabelled(own, left, unlabelled, spare=tested is left, seed=seed) if unlabelled else []
    names = {one.name for one in bare}
    tested = [one for one in tested if one.name not in names]
    kept = round(validation * len(trained)) if validation else 0
    kept = min(max(kept, 1), len(trained) - 1) if validation and len(trained) > 1 else 0
    others = [one for one in utterances if one.speaker != target and one.text]
    if source_speakers is not None:
        others = [one for one in others if one.speaker in {*source_speakers, *held_out_speakers}]
    train, test = _of_source(others, held_out_speakers, held_out)
    return Split(trained[kept:], trained[:kept], tested, train, test, bare)


def sequences(
    utterances: Sequence[Utterance],
    inputs: Sequence[Tensor],
    encode: Callable[[str], list[int]],
) -> Sequences:
    """Return utterances as data, those without a text unlabelled; recordings are read when they are needed."""
    known = tuple(bool(one.text) for one in utterances)
    return Sequences(
        inputs=inputs,
        labels=tuple(torch.tensor(encode(one.text), dtype=torch.long) for one in utterances),
        names=tuple(one.name for one in utterances),
        groups=tuple(one.speaker for one in utterances),
        seconds=tuple(one.seconds for one in utterances),
        labelled=() if all(known) else known,
    )


def _official(utterances: Sequence[Utterance]) -> tuple[list[Utterance], list[Utterance]] | None:
    """Return the official training part and test part; None unless both are there.

    The test part is ``test``, or ``dev`` without one. What no part names is trained on as ``train`` is, and ``dev`` is
    if that is all there is beside ``test``.
    """
    of: dict[Part, list[Utterance]] = {"train": [], "dev": [], "test": []}
    for one in utterances:
        of[one.part or "train"].append(one)
    pairs = (of["train"], of["test"]), (of["dev"], of["test"]), (of["train"], of["dev"])
    return next((pair for pair in pairs if all(pair)), None)


def _of_target(
    target: str, own: list[Utterance], shots: int, seed: int
) -> tuple[list[Utterance], list[Utterance], list[Utterance]]:
    """Return the shots, what they leave of the part they are drawn from, and what is tested on."""
    official = _official(own)
    pool = official[0] if official else own
    if not pool:
        raise DataError(
            f"data.target: {target!r} must have an utterance with a text to test on; received none. Add one."
        )
    most = len(pool) if official else len(pool) - 1
    if shots > most:
        part = " in its training part" if official else ", of which one must be left to test on"
        raise DataError(
            f"data.shots: {target!r} has {counted(len(pool), 'utterance')}{part}; received {shots}. Set data.shots to "
            f"at most {most}."
        )
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = [pool[place] for place in order[:shots]]
    left = [one for one in pool if one not in set(chosen)]
    return chosen, left, official[1] if official else left


def _unlabelled(
    own: list[Utterance], left: list[Utterance], count: int | Literal["all"], *, spare: bool, seed: int
) -> list[Utterance]:
    """Return the target's utterances to train on without their texts; of those with one, ``spare`` leaves one."""
    bare = [one for one in own if not one.text and one.part in (None, "train")]
    if count == "all":
        if not bare:
            raise DataError(
                "data.unlabelled.utterances: all takes the target's utterances without a text, and there is none. Add "
                "some, or give a number: others are then taken without reading their texts."
            )
        return bare
    most = len(bare) + len(left) - spare
    if count > most:
        raise DataError(
            f"data.unlabelled.utterances: {own[0].speaker!r} has {counted(most, 'utterance')} that "
            f"{agreeing(most, 'is')} neither shots nor tested on; received {count}. Set it to at most {most}."
        )
    generator = torch.Generator().manual_seed(seed)
    order = [[part[place] for place in torch.randperm(len(part), generator=generator)] for part in (bare, left)]
    return [replace(one, text="") for one in [*order[0], *order[1]][:count]]


def _of_source(
    others: list[Utterance], held_out_speakers: Sequence[str], held_out: float
) -> tuple[list[Utterance], list[Utterance]]:
    train, test = _official(others) or ([one for one in others if not in_held_out_part(one.name, held_out)], None)
    tested = set(others) - set(train) if test is None else set(test)
    tested |= {one for one in others if one.speaker in held_out_speakers}
    return [one for one in train if one not in tested], [one for one in others if one in tested]
