"""Utterances of several speakers, split into the two domains of a run."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from unicodedata import normalize

import torch
from torch import Tensor

from conservtl.data.sequences import Sequences
from conservtl.errors import DataError

__all__ = ["Part", "Split", "Utterance", "in_share", "split_utterances"]

Part = Literal["train", "dev", "test"]

_SHOWN = 12  # speakers in a message


@dataclass(frozen=True)
class Utterance:
    """An utterance with its text.

    Args:
        name: unique; of a file below the root, with its offset if it has one.
        text: normalised.
        speaker: the speaker.
        seconds: its duration.
        file: the recording; None: it is made up.
        offset: start of the utterance in the file, in seconds.
        part: the official part it belongs to; None: there is none.
    """

    name: str
    text: str
    speaker: str
    seconds: float
    file: Path | None = None
    offset: float = 0.0
    part: Part | None = None


@dataclass(frozen=True)
class Split:
    """Utterances by their use in a run.

    Args:
        shots: of the target, to train on.
        validation: of the target, to select on.
        target_test: of the target, to test on.
        source_train: of other speakers, to train a source model on.
        source_test: of other speakers, to measure what is kept.
    """

    shots: list[Utterance]
    validation: list[Utterance]
    target_test: list[Utterance]
    source_train: list[Utterance]
    source_test: list[Utterance]


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
) -> Split:
    """Split utterances into the target's shots and test part, and the source's training and test parts.

    Official parts are kept: shots come from the target's training part and its test part is tested on, where it has
    both; the source's test part is the official one, where there is one. Else the shots are drawn from all of the
    target's, and ``held_out_speakers`` and a share ``held_out`` of each source speaker's utterances are tested on.

    Args:
        utterances: of all speakers.
        target: the target speaker.
        shots: utterances to adapt with.
        validation: share of them to validate on.
        seed: draws the shots.
        source_speakers: None: all but the target.
        held_out_speakers: source speakers to test on only.
        held_out: share of the source's utterances to test on, by their names' hashes.

    Raises:
        DataError: a speaker is unknown, or has too few utterances.
    """
    known = sorted({one.speaker for one in utterances})
    own = [one for one in utterances if one.speaker == target]
    if not own:
        raise DataError(
            f"data.target must be a speaker of the data; received {target!r}. Choose one of: {_listed(known)}."
        )
    named = {"data.source_speakers": source_speakers or (), "data.held_out_speakers": held_out_speakers}
    for field, speakers in named.items():
        if target in speakers:
            raise DataError(f"{field} must not contain data.target; received {target!r} in both. Remove it.")
        if missing := sorted(set(speakers) - set(known)):
            raise DataError(
                f"{field} must be speakers of the data; received {_listed(missing)}. Choose from: {_listed(known)}."
            )
    trained, tested = _of_target(own, shots, seed)
    kept = round(validation * len(trained)) if validation else 0
    kept = min(max(kept, 1), len(trained) - 1) if validation and len(trained) > 1 else 0
    others = [one for one in utterances if one.speaker != target]
    if source_speakers is not None:
        others = [one for one in others if one.speaker in {*source_speakers, *held_out_speakers}]
    train, test = _of_source(others, held_out_speakers, held_out)
    return Split(trained[kept:], trained[:kept], tested, train, test)


def in_share(name: str, share: float) -> bool:
    """Return whether a name belongs to a random part that is the same in every run, by its hash."""
    return int(hashlib.sha256(normalize("NFC", name).encode()).hexdigest()[:8], 16) < share * 2**32


def sequences(
    utterances: Sequence[Utterance],
    inputs: Sequence[Tensor],
    encode: Callable[[str], list[int]],
) -> Sequences:
    """Return utterances as data; recordings are read when they are needed."""
    return Sequences(
        inputs=inputs,
        labels=tuple(torch.tensor(encode(one.text), dtype=torch.long) for one in utterances),
        names=tuple(one.name for one in utterances),
        groups=tuple(one.speaker for one in utterances),
        seconds=tuple(one.seconds for one in utterances),
    )


def _of_target(own: list[Utterance], shots: int, seed: int) -> tuple[list[Utterance], list[Utterance]]:
    official = {part: [one for one in own if one.part == part] for part in ("train", "test")}
    fixed = bool(official["train"] and official["test"])
    pool = official["train"] if fixed else own
    if shots > len(pool) - (0 if fixed else 1):
        most = len(pool) if fixed else len(pool) - 1
        part = " in its training part" if fixed else ", of which one must be left to test on"
        raise DataError(
            f"data.shots: {own[0].speaker!r} has {len(pool)} utterances{part}; received {shots}. Set data.shots to at "
            f"most {most}."
        )
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = [pool[place] for place in order[:shots]]
    rest = official["test"] if fixed else [one for one in own if one not in set(chosen)]
    return chosen, rest


def _of_source(
    others: list[Utterance], held_out_speakers: Sequence[str], held_out: float
) -> tuple[list[Utterance], list[Utterance]]:
    official = next((part for part in ("test", "dev") if any(one.part == part for one in others)), None)
    known = {one.part for one in others}

    def is_tested(one: Utterance) -> bool:
        if one.speaker in held_out_speakers:
            return True
        return one.part == official if official is not None and "train" in known else in_share(one.name, held_out)

    test = [one for one in others if is_tested(one)]
    train = (
        [one for one in others if not is_tested(one) and one.part in (None, "train")]
        if "train" in known
        else [one for one in others if not is_tested(one)]
    )
    return train, test


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(repr, names[:_SHOWN])) + more
