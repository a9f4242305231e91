"""Conversion of recordings to inputs: read, mix, resample, cut or pad, log-mel, normalise."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from conservtl.bounds import Fraction
from conservtl.errors import DataError
from conservtl.extras import require
from conservtl.spec_model import FrozenModel

__all__ = ["Features", "SpeechPreprocessing", "fit_length", "log_mel", "normalise", "read_audio"]

_TINY = 1e-10  # power of silence: -100 dB
_FLAT = 1e-5  # standard deviation of silence, which becomes zeros
_BATCH = 256  # recordings in one mel computation, which bounds the memory of the spectrogram
_BLOCK = 2048  # recordings in memory as samples


class Features(FrozenModel):
    """Conversion of a recording to an input of the network."""

    kind: Literal["logmel", "waveform"] = "logmel"
    """`logmel`: (n_mels, frames). `waveform`: (samples,), for networks on samples."""
    sample_rate: Annotated[int, Field(ge=2000, le=96_000)] = 8000
    """Sample rate in Hz. Recordings with another rate are resampled."""
    length: Annotated[float, Field(gt=0, le=60)] = 1.0
    """Length in seconds. Longer recordings are cut and shorter ones padded with silence, equally at both ends."""
    n_mels: Annotated[int, Field(ge=1, le=512)] = 40
    """Number of mel bands."""
    window: Fraction = 0.040
    """Length of the analysis window in seconds."""
    hop: Fraction = 0.020
    """Time between frames in seconds."""
    range_db: Annotated[float, Field(gt=0, le=200)] = 40.0
    """Level in dB below the recording's peak at which values are clipped, so that the noise level of a microphone
    matters less."""
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

    def read(self, files: Sequence[Path]) -> Tensor:
        """Return inputs for these recordings, (N, n_mels, frames) or (N, samples), float32.

        Raises:
            DataError: a file is missing, unreadable or empty, or no file is given.
            MissingExtraError: soundfile or torchaudio is not installed.
        """
        if not files:
            raise DataError("files must name at least one recording; received none. Check the pattern of the files.")
        blocks = [files[at : at + _BLOCK] for at in range(0, len(files), _BLOCK)]
        return torch.cat([self.transform([read_audio(Path(f)) for f in block]) for block in blocks])

    def transform(self, recordings: Sequence[tuple[Tensor, int]]) -> Tensor:
        """Return inputs for recordings in memory, each (samples,) with its sample rate in Hz; at least one."""
        waves = _to_rate(recordings, self.features)
        if self.features.kind == "waveform":
            return normalise(waves, self.features.normalise)
        return torch.cat([log_mel(part, self.features) for part in torch.split(waves, _BATCH)])


def read_audio(file: Path) -> tuple[Tensor, int]:
    """Return a recording, mixed to mono: (samples,) float32 in [-1, 1], and its sample rate in Hz.

    Raises:
        DataError: the file cannot be read as audio, has no samples, or has samples that are not finite.
    """
    soundfile = require("soundfile", "speech")
    try:
        samples, rate = soundfile.read(str(file), dtype="float32", always_2d=True)
    except (OSError, RuntimeError) as error:  # soundfile.LibsndfileError is a RuntimeError
        raise DataError(
            f"{file} cannot be read as audio: {str(error).rstrip(chr(46))}. Replace or remove it."
        ) from error
    wave = torch.from_numpy(samples).mean(dim=1)
    if wave.numel() == 0 or not bool(wave.isfinite().all()):
        fault = "has no samples" if wave.numel() == 0 else "has samples that are not finite"
        raise DataError(f"{file} {fault}. Replace or remove it.")
    return wave, int(rate)


def fit_length(wave: Tensor, samples: int) -> Tensor:
    """Cut or zero-pad the last dimension to ``samples``, equally at both ends."""
    excess = wave.shape[-1] - samples
    if excess > 0:
        return wave[..., excess // 2 : excess // 2 + samples]
    return torch.nn.functional.pad(wave, (-excess // 2, -excess - -excess // 2))


def _to_rate(recordings: Sequence[tuple[Tensor, int]], features: Features) -> Tensor:
    """Return all recordings at one rate and length, (N, samples), with one resampling for each rate."""
    functional = require("torchaudio.functional", "speech")
    waves = torch.empty(len(recordings), features.samples)
    for rate in sorted({rate for _, rate in recordings}):
        chosen = [i for i, (_, other) in enumerate(recordings) if other == rate]
        length = max(1, round(features.length * rate))
        stacked = torch.stack([fit_length(recordings[i][0], length) for i in chosen])
        if rate != features.sample_rate:
            stacked = functional.resample(stacked, rate, features.sample_rate)
        waves[chosen] = fit_length(stacked, features.samples)
    return waves


def log_mel(waves: Tensor, features: Features) -> Tensor:
    """Return log-mel spectrograms in units of 10 dB, clipped ``range_db`` below their peaks and normalised.

    Args:
        waves: (N, samples) at ``features.sample_rate``.
        features: the settings.

    Returns:
        (N, n_mels, frames) float32, finite also for silence.
    """
    transforms = require("torchaudio.transforms", "speech")
    window = max(1, round(features.window * features.sample_rate))
    spectrogram = transforms.MelSpectrogram(
        sample_rate=features.sample_rate,
        n_fft=2 ** (2 * window - 1).bit_length(),  # padded, so that each low mel band has a bin
        win_length=window,
        hop_length=max(1, round(features.hop * features.sample_rate)),
        f_min=20.0,
        n_mels=features.n_mels,
        power=2.0,
        pad_mode="constant",  # silence: reflection fails for a recording shorter than the window
    )
    level = spectrogram(waves).clamp_min(_TINY).log10()
    floor = level.amax(dim=(-2, -1), keepdim=True) - features.range_db / 10
    return normalise(level.maximum(floor), features.normalise)


def normalise(inputs: Tensor, kind: Literal["none", "mean", "mean_variance"]) -> Tensor:
    """Normalise each recording by its own mean and standard deviation; silence becomes zeros.

    Args:
        inputs: (N, ...).
        kind: `none`, `mean`, or `mean_variance`.
    """
    if kind == "none":
        return inputs
    over = tuple(range(1, inputs.ndim))
    centred = inputs - inputs.mean(dim=over, keepdim=True)
    if kind == "mean":
        return centred
    deviation = centred.square().mean(dim=over, keepdim=True).sqrt()
    return torch.where(deviation > _FLAT, centred / deviation.clamp_min(_FLAT), torch.zeros_like(centred))
