"""Inputs of utterances, read when they are needed: from files, or spoken by synthetic voices."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from conservtl.errors import DataError
from conservtl.tasks.audio import espeak
from conservtl.tasks.audio.reading import read_audio
from conservtl.tasks.audio.resampling import resample
from conservtl.tasks.audio.waves import WaveChange
from conservtl.tasks.bad_files import shown_name
from conservtl.tasks.transcribe.features import Features
from conservtl.tasks.transcribe.utterances import Utterance

__all__ = ["FileInputs", "Inputs", "SpokenInputs", "read_utterance"]

_KEPT = 2**31  # bytes of inputs that are kept in memory; others are read each time


def read_utterance(one: Utterance) -> tuple[Tensor, int]:
    """Return the samples of an utterance in a file, (samples,), and the sample rate in Hz.

    Raises:
        DataError: the file cannot be read, or ends before the utterance does.
    """
    if one.file is None:
        raise DataError(f"{shown_name(one.name)} has no recording.")
    wave, rate = read_audio(one.file, one.offset, one.seconds)
    if len(wave) < (one.seconds - 0.05) * rate:
        raise DataError(
            f"{shown_name(one.name)} must lie within its recording of {one.offset + len(wave) / rate:.2f} s; received "
            f"offset {one.offset:g} and duration {one.seconds:g}. Correct the manifest."
        )
    return wave, rate


class Inputs(Sequence[Tensor]):
    """Inputs that are made when they are indexed, and kept while they fit into memory."""

    change: WaveChange | None = None
    """How recordings change at random in training; None: they do not."""

    def __init__(self, utterances: Sequence[Utterance], features: Features) -> None:
        self.utterances, self.features = list(utterances), features
        self._made: dict[int, Tensor] = {}
        self._bytes = 0
        self._device = torch.device("cpu")
        self._place: Callable[[int, torch.device], torch.device] | None = None
        self._elsewhere: dict[torch.device, Inputs] = {}

    def on(self, device: torch.device, place: Callable[[int, torch.device], torch.device]) -> Inputs:
        """Return the inputs with features computed on a device and kept where ``place`` says; of a CPU, themselves."""
        if device.type == "cpu":
            return self
        if device not in self._elsewhere:
            self._elsewhere[device] = other = copy.copy(self)
            vars(other).update(_made={}, _bytes=0, _device=device, _place=place, _elsewhere={})
        return self._elsewhere[device]

    def __len__(self) -> int:
        return len(self.utterances)

    def __getitem__(self, place: Any) -> Any:
        if (found := self._made.get(place)) is not None:
            return found.to(self._device)
        made = self._converted(*self.wave(int(place)))
        if self._bytes < _KEPT:
            self._keep(place, made)
        return made

    def _converted(self, wave: Tensor, rate: int) -> Tensor:
        return self.features(wave.to(self._device), rate)

    def _keep(self, place: int, made: Tensor) -> None:
        where = self._device if self._place is None else self._place(made.nbytes, self._device)
        self._made[place] = made.to(where)
        self._bytes += made.nbytes if where.type == "cpu" else 0

    @property
    def durations(self) -> tuple[float, float] | None:
        """Shortest and longest duration of a changed recording, as multiples of its own; None: they do not change."""
        return None if self.change is None else self.change.durations

    def varied(self, place: int, generator: torch.Generator | None) -> Tensor:
        """Return the input of an utterance whose recording is changed at random, by draws from ``generator``.

        None: at its shortest.
        """
        wave, rate = self.wave(place)
        if self.change is not None:
            wave = resample((wave - wave.mean()).unsqueeze(0), rate, self.features.sample_rate)[0]
            change = self.change.shortest if generator is None else partial(self.change, generator=generator)
            wave, rate = change(wave), self.features.sample_rate
        return self._converted(wave, rate)

    @abstractmethod
    def wave(self, place: int) -> tuple[Tensor, int]:
        """Return the samples of an utterance and their rate in Hz."""


class FileInputs(Inputs):
    """Inputs of utterances in files.

    Args:
        utterances: with their files.
        features: how a recording becomes an input.
    """

    def wave(self, place: int) -> tuple[Tensor, int]:
        """Return the samples of an utterance and their rate in Hz."""
        return read_utterance(self.utterances[place])


class SpokenInputs(Inputs):
    """Inputs of utterances by espeak-ng voices, synthesised together at the first access.

    Args:
        utterances: their speakers are voices.
        features: how a recording becomes an input.
        spoken: name of each utterance -> what the voice says, and how.
        speak: synthesises utterances.
    """

    def __init__(
        self,
        utterances: Sequence[Utterance],
        features: Features,
        spoken: Mapping[str, espeak.Utterance],
        speak: Callable[[Sequence[espeak.Utterance]], list[tuple[Tensor, int]]] = espeak.speak,
    ) -> None:
        super().__init__(utterances, features)
        self._spoken, self._speak = spoken, speak
        self._waves: list[tuple[Tensor, int]] = []

    def __getitem__(self, place: Any) -> Any:
        if not self._made:
            for number, wave in enumerate(self._said()):
                self._keep(number, self._converted(*wave))
        return self._made[place].to(self._device)

    def wave(self, place: int) -> tuple[Tensor, int]:
        """Return the samples of an utterance and their rate in Hz; at the first call all are synthesised again."""
        if not self._waves:  # together: what espeak-ng says depends on what it has said before
            self._waves = self._said()
        return self._waves[place]

    def _said(self) -> list[tuple[Tensor, int]]:
        return self._speak([self._spoken[one.name] for one in self.utterances])
