"""Conversion of recordings to inputs: centre, cut or pad, resample, log-mel, normalise."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from math import ceil
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from conservtl.bounds import Fraction
from conservtl.errors import DataError
from conservtl.spec_model import FrozenModel
from conservtl.tasks.audio.mel import mel_power, normalise
from conservtl.tasks.audio.reading import digest, loudest_stretch, read_audio
from conservtl.tasks.audio.resampling import resample

__all__ = ["Features", "SpeechPreprocessing", "fit_length", "log_mel"]

_BEFORE = {"remove_mean": False, "cut": "middle", "level": "peak"}  # what models did that were saved without the fields
_CLICK = 0.020  # seconds of a recording that its level disregards
_TINY = 1e-10  # power of silence: -100 dB
_BATCH = 256  # recordings in one mel computation, which bounds the memory of the spectrogram
_BLOCK = 2048  # recordings in memory as samples, and
_BLOCK_VALUES = 2**27  # their samples, which are fewer of high rates


class Features(FrozenModel):
    """Conversion of a recording to an input of the network."""

    kind: Literal["logmel", "waveform"] = "logmel"
    """`logmel`: (n_mels, frames). `waveform`: (samples,), for networks on samples."""
    sample_rate: Annotated[int, Field(ge=2000, le=96_000)] = 8000
    """Sample rate in Hz. Recordings with another rate are resampled."""
    length: Annotated[float, Field(gt=0, le=60)] = 1.0
    """Length in seconds. Longer recordings are cut, and shorter ones padded with silence, equally at both ends."""
    cut: Literal["loudest", "middle"] = "loudest"
    """Stretch of a longer recording that is kept: where it is loudest (a click counts little), or its middle."""
    remove_mean: bool = True
    """Whether to subtract the mean of a recording's samples: the offset of a microphone or its amplifier."""
    n_mels: Annotated[int, Field(ge=1, le=512)] = 40
    """Number of mel bands."""
    window: Fraction = 0.040
    """Length of the analysis window in seconds."""
    hop: Fraction = 0.020
    """Time between frames in seconds."""
    range_db: Annotated[float, Field(gt=0, le=200)] = 40.0
    """Level in dB below the recording's own at which values are clipped, so that the noise level of a microphone
    matters less."""
    level: Literal["robust", "peak"] = "robust"
    """The recording's own level. `robust`: the peak of its frames but the few loudest, at which louder values are
    clipped, so that a click does not hide the speech. `peak`: the largest value."""
    normalise: Literal["none", "mean", "mean_variance"] = "mean_variance"
    """Normalisation of each recording: subtract the mean (of all bands and frames), or also scale to unit variance."""

    @property
    def samples(self) -> int:
        """Number of samples at ``sample_rate``."""
        return max(1, round(self.length * self.sample_rate))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        if self.kind == "waveform":
            return (self.samples,)
        return (self.n_mels, 1 + self.samples // max(1, round(self.hop * self.sample_rate)))


class SpeechPreprocessing(FrozenModel):
    """Conversion of files to inputs. It is saved with the adapted model."""

    features: Features = Features()
    """How a recording becomes an input."""

    @model_validator(mode="before")
    @classmethod
    def _as_it_was(cls, content: Any) -> Any:
        """Let the features of a file that was written before some fields existed mean what they did."""
        features = content.get("features") if isinstance(content, Mapping) else None
        return {**content, "features": {**_BEFORE, **features}} if isinstance(features, Mapping) else content

    def read(self, files: Sequence[Path], digests: MutableMapping[str, str] | None = None) -> Tensor:
        """Return inputs for recordings, (N, n_mels, frames) or (N, samples); note digests of their samples by name.

        Raises:
            DataError: a file is missing, unreadable, empty or silent, its channels cancel, or no file is given.
            MissingExtraError: soundfile is not installed.
        """
        if not files:
            raise DataError("files must name at least one recording; received none. Check the pattern of the files.")
        inputs: list[Tensor] = []
        block: list[tuple[Tensor, int]] = []
        values = 0
        for file in files:
            wave, rate = read_audio(Path(file))
            if digests is not None:
                digests[str(file)] = digest(wave, rate)
            block.append((_stretch(wave, rate, self.features).clone(), rate))  # the rest of it leaves the memory
            values += len(block[-1][0])
            if len(block) == _BLOCK or values > _BLOCK_VALUES:
                inputs.append(self._inputs(block))
                block, values = [], 0
        return torch.cat([*inputs, self._inputs(block)] if block else inputs)

    def transform(self, recordings: Sequence[tuple[Tensor, int]]) -> Tensor:
        """Return inputs for recordings in memory, each (samples,) with its sample rate in Hz; at least one."""
        return self._inputs([(_stretch(wave, rate, self.features), rate) for wave, rate in recordings])

    def _inputs(self, stretches: Sequence[tuple[Tensor, int]]) -> Tensor:
        waves = _to_rate(stretches, self.features)
        if self.features.kind == "waveform":
            return normalise(waves, self.features.normalise)
        return torch.cat([log_mel(part, self.features) for part in torch.split(waves, _BATCH)])


def fit_length(wave: Tensor, samples: int) -> Tensor:
    """Cut or zero-pad the last dimension to ``samples``, equally at both ends."""
    excess = wave.shape[-1] - samples
    if excess > 0:
        return wave[..., excess // 2 : excess // 2 + samples]
    return torch.nn.functional.pad(wave, (-excess // 2, -excess - -excess // 2))


def _to_rate(stretches: Sequence[tuple[Tensor, int]], features: Features) -> Tensor:
    """Return stretches of one duration at one rate, (N, samples), with one resampling for each rate."""
    waves = torch.empty(len(stretches), features.samples)
    for rate in sorted({rate for _, rate in stretches}):
        chosen = [i for i, (_, other) in enumerate(stretches) if other == rate]
        stacked = torch.stack([stretches[i][0] for i in chosen])
        waves[chosen] = fit_length(resample(stacked, rate, features.sample_rate), features.samples)
    return waves


def _stretch(wave: Tensor, rate: int, features: Features) -> Tensor:
    """Return the part of a recording that is used, at its own rate; padded where the recording is shorter."""
    length = max(1, round(features.length * rate))
    if features.remove_mean:
        wave = wave - wave.mean(dim=-1, keepdim=True)
    if features.cut == "loudest" and wave.shape[-1] > length:
        wave = loudest_stretch(wave, rate, length)
    return fit_length(wave, length)


def log_mel(waves: Tensor, features: Features) -> Tensor:
    """Return log-mel spectrograms of (N, samples) in units of 10 dB, clipped ``range_db`` below their level.

    Returns:
        (N, n_mels, frames) float32, finite also for silence.
    """
    window, hop = (max(1, round(seconds * features.sample_rate)) for seconds in (features.window, features.hop))
    power = mel_power(
        waves,
        rate=features.sample_rate,
        bands=features.n_mels,
        n_fft=2 ** (2 * window - 1).bit_length(),  # padded, so that each low mel band has a bin
        window=window,
        hop=hop,
        f_min=20.0,
    )
    values = power.clamp_min(_TINY).log10()
    peaks = values.amax(dim=-2)
    if features.level == "robust":
        touched = ceil((features.window + _CLICK) / features.hop)  # frames that a click can be in
        top = peaks.topk(min(1 + touched, peaks.shape[-1])).values[:, -1].view(-1, 1, 1)
        values = values.minimum(top)
    else:
        top = peaks.amax(dim=-1).view(-1, 1, 1)
    return normalise(values.maximum(top - features.range_db / 10), features.normalise)
