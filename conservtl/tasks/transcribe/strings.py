"""Strings of words: recordings of single words in a row, with gaps, drawn by a seed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conservtl.errors import DataError
from conservtl.tasks.audio.reading import read_audio
from conservtl.tasks.audio.resampling import resample
from conservtl.tasks.speech.recordings import Recording
from conservtl.tasks.transcribe.features import Features
from conservtl.tasks.transcribe.recordings import Inputs
from conservtl.tasks.transcribe.text import Normalisation
from conservtl.tasks.transcribe.utterances import Utterance

__all__ = ["StringInputs", "Strung", "strings_of"]

_EDGE = 0.1  # seconds of silence at both ends, at most
_ROOM = 1e-3  # of the recordings' level: noise of the gaps
_GUESS = 0.45  # seconds of a word, to sort strings by; nothing is read for it


@dataclass(frozen=True)
class Strung:
    """A string of recordings.

    Args:
        recordings: one word each, in order.
        gaps: seconds before each word, and after the last.
        seed: draws the noise of the gaps.
    """

    recordings: tuple[Recording, ...]
    gaps: tuple[float, ...]
    seed: int


def strings_of(
    recordings: Sequence[Recording],
    name: str,
    count: int,
    *,
    words: tuple[int, int],
    gap: tuple[float, float],
    text: Normalisation,
) -> dict[Utterance, Strung]:
    """Draw strings of one speaker's recordings, by the hash of a name: a word is drawn first, then a recording of it.

    Bounds are the least and largest number of words, and the shortest and longest gap between words in seconds.
    """
    if not recordings:
        raise DataError(f"data: there is no recording for {name!r}. Add recordings, or change data.held_out_takes.")
    by_label: dict[str, list[Recording]] = {}
    for one in recordings:
        by_label.setdefault(one.label, []).append(one)
    labels = sorted(by_label)
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:6])
    generator = torch.Generator().manual_seed(seed)

    def below(bound: int) -> int:
        return int(torch.randint(bound, (), generator=generator))

    found = {}
    for number in range(count):
        length = words[0] + below(words[1] - words[0] + 1)
        chosen = []
        for _ in range(length):
            takes = by_label[labels[below(len(labels))]]
            chosen.append(takes[below(len(takes))])
        draws = torch.rand(length + 1, generator=generator).tolist()
        inner = [gap[0] + draw * (gap[1] - gap[0]) for draw in draws[1:-1]]
        gaps = (_EDGE * draws[0], *inner, _EDGE * draws[-1])
        said = text(" ".join(one.label for one in chosen))
        utterance = Utterance(f"{name}/{number} {said}", said, chosen[0].speaker, sum(gaps) + _GUESS * length)
        found[utterance] = Strung(tuple(chosen), gaps, seed + number)
    return found


class StringInputs(Inputs):
    """Inputs of strings, read and joined when they are indexed.

    Args:
        utterances: to make.
        features: how a recording becomes an input.
        strung: the recordings of each utterance.
    """

    def __init__(self, utterances: Sequence[Utterance], features: Features, strung: Mapping[Utterance, Strung]) -> None:
        super().__init__(utterances, features)
        self._strung = strung

    @property
    def files(self) -> list[Path]:
        """The recordings of all strings, in order."""
        return [Path(one.name) for utterance in self.utterances for one in self._strung[utterance].recordings]

    @property
    def gaps(self) -> list[tuple[float, ...]]:
        """The gaps of each string in seconds."""
        return [self._strung[utterance].gaps for utterance in self.utterances]

    def wave(self, place: int) -> tuple[Tensor, int]:
        """Return the samples of a string at the rate of the features."""
        return joined(self._strung[self.utterances[place]], self.features.sample_rate)


def joined(strung: Strung, rate: int) -> tuple[Tensor, int]:
    """Return recordings in a row, all at one level, with faint noise in the gaps: (samples,) and the rate in Hz."""
    generator = torch.Generator().manual_seed(strung.seed)
    waves = [_word(one.name, rate) for one in strung.recordings]
    pieces: list[Any] = []
    for gap, wave in zip(strung.gaps, [*waves, torch.empty(0)], strict=True):
        pieces += [torch.zeros(round(gap * rate)), wave]
    whole = torch.cat(pieces)
    return whole + _ROOM * torch.randn(len(whole), generator=generator), rate


@lru_cache(maxsize=4096)
def _word(file: str, rate: int) -> Tensor:
    wave, own = read_audio(Path(file))
    wave = resample((wave - wave.mean()).unsqueeze(0), own, rate)[0]
    return wave / wave.abs().max().clamp_min(1e-9) / 2
