"""Changes of recordings before their features are computed: speed, room and noise."""

from __future__ import annotations

from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Protocol

import torch
from annotated_types import MinLen
from pydantic import Field
from torch import Tensor

from conservtl.errors import SpecError
from conservtl.spec_model import FrozenModel
from conservtl.tasks.audio.listing import audio_files, usable_recordings
from conservtl.tasks.audio.noise import AnyNoise, RecordedNoise, at_snr, babble, coloured, stretch
from conservtl.tasks.audio.reading import read_audio
from conservtl.tasks.audio.resampling import resample
from conservtl.tasks.audio.rooms import AnyRoom, RecordedRoom, decaying, reverberated

__all__ = ["Voices", "WaveAugment", "WaveChange", "at_speed"]


class WaveAugment(FrozenModel):
    """Changes of each recording, drawn anew in each epoch by the run's seed and the utterance's name.

    An utterance changes alike whatever the batch it is in, and in a run that is resumed.

    Reference:
        Ko et al., "Audio Augmentation for Speech Recognition", Interspeech 2015 (speed); Ko et al., "A Study on Data
        Augmentation of Reverberant Speech for Robust Speech Recognition", ICASSP 2017 (rooms and noise).
    """

    speeds: Annotated[tuple[Annotated[float, Field(ge=0.5, le=2)], ...], MinLen(1)] = (0.9, 1.0, 1.1)
    """Speeds of which one is drawn; 1.1 is quicker and higher. CTC needs a frame for each token at the highest."""
    room: AnyRoom | None = None
    """Rooms that some recordings are put into; null: none."""
    noise: AnyNoise | None = None
    """Noise that is added to some recordings; null: none."""

    @property
    def files(self) -> list[Path]:
        """Recordings that this depends on, in order."""
        recorded = [one for one in (self.room, self.noise) if isinstance(one, (RecordedRoom, RecordedNoise))]
        return [file for one in recorded for file in sorted(audio_files(one.root, follow_links=True)[0])]


class Voices(Protocol):
    """Recordings of several speakers."""

    def __len__(self) -> int: ...

    def wave(self, place: int) -> tuple[Tensor, int]:
        """Return the samples of a recording and their rate in Hz."""
        ...


class WaveChange:
    """The changes of a ``WaveAugment`` at one sample rate.

    Args:
        spec: the changes.
        rate: sample rate in Hz of the recordings to change.
        voices: recordings of which a babble is made; None: there are none.

    Raises:
        DataError: a folder holds no recordings, or one that cannot be used.
        SpecError: a babble is to be made, and there are no voices.
    """

    def __init__(self, spec: WaveAugment, rate: int, voices: Voices | None = None) -> None:
        self.spec, self.rate, self._voices = spec, rate, voices
        self._noises, self._rooms = [_files(name, one) for name, one in (("noise", spec.noise), ("room", spec.room))]
        if "babble" in getattr(spec.noise, "colours", ()) and not voices:
            raise SpecError(
                "data.augment.waves.noise.colours: a babble is made of the source's utterances, and this run reads "
                "none. Leave babble out, give source.data, or take recordings of noise (kind: files)."
            )

    @property
    def durations(self) -> tuple[float, float]:
        """Durations of the quickest and the slowest version of a recording, as multiples of its own."""
        return 1 / max(self.spec.speeds), 1 / min(self.spec.speeds)

    def shortest(self, wave: Tensor) -> Tensor:
        """Return a recording, (samples,), at the highest speed."""
        return at_speed(wave, max(self.spec.speeds))

    def __call__(self, wave: Tensor, generator: torch.Generator) -> Tensor:
        """Return a changed recording, (samples,); draws come from ``generator`` alone."""
        speeds, room, noise = self.spec.speeds, self.spec.room, self.spec.noise
        wave = at_speed(wave, speeds[_below(len(speeds), generator)])
        if room is not None and float(torch.rand((), generator=generator)) < room.share:
            if isinstance(room, RecordedRoom):
                response = _recording(self._rooms[_below(len(self._rooms), generator)], self.rate)
            else:
                drawn = _between(room.rt60, generator), _between(room.direct, generator)
                response = decaying(*drawn, self.rate, generator)
            wave = reverberated(wave, response)
        if noise is not None and float(torch.rand((), generator=generator)) < noise.share:
            snr = _between(noise.snr, generator)
            if isinstance(noise, RecordedNoise):
                recording = _recording(self._noises[_below(len(self._noises), generator)], self.rate)
                return at_snr(wave, stretch(recording - recording.mean(), len(wave), generator), snr)
            colour = noise.colours[_below(len(noise.colours), generator)]
            if colour == "babble":
                return at_snr(wave, self._babble(noise.voices, len(wave), generator), snr)
            return at_snr(wave, coloured(colour, len(wave), generator), snr)
        return wave

    def _babble(self, voices: int, samples: int, generator: torch.Generator) -> Tensor:
        waves = []
        for _ in range(voices):
            wave, rate = self._voices.wave(_below(len(self._voices), generator))  # type: ignore[union-attr,arg-type]
            waves.append(resample((wave - wave.mean()).unsqueeze(0), rate, self.rate)[0])
        return babble(waves, samples, generator)


def at_speed(waves: Tensor, speed: float) -> Tensor:
    """Return recordings, (..., samples), played at a multiple of their speed: ceil(samples / speed) samples.

    They are resampled, as by ``torchaudio.functional.speed``; the speed is rounded to a fraction of small numbers.
    """
    ratio = Fraction(speed).limit_denominator(100)
    changed = resample(waves.reshape(-1, waves.shape[-1]), ratio.numerator, ratio.denominator)
    return changed.view(*waves.shape[:-1], -1)


def _files(name: str, spec: object) -> list[Path]:
    if not isinstance(spec, (RecordedNoise, RecordedRoom)):
        return []
    return usable_recordings(spec.root, f"data.augment.waves.{name}.root", follow_links=spec.follow_links)


@lru_cache(maxsize=64)
def _recording(file: Path, rate: int) -> Tensor:
    wave, own = read_audio(file)
    return resample(wave.unsqueeze(0), own, rate)[0]


def _below(bound: int, generator: torch.Generator) -> int:
    return int(torch.randint(bound, (), generator=generator))


def _between(bounds: tuple[float, float], generator: torch.Generator) -> float:
    return bounds[0] + (bounds[1] - bounds[0]) * float(torch.rand((), generator=generator))
