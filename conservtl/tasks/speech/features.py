"""From recordings to network inputs of one shape: read, mix, resample, cut or pad, log-mel, normalise."""

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

_TINY = 1e-10  # power below which everything is silence; log10 of it is -100 dB
_FLAT = 1e-5  # standard deviation below which a recording is silence and stays zero
_BATCH = 256  # recordings a mel computation: bounds the memory of the spectrogram
_BLOCK = 2048  # recordings in memory as samples at one time


class Features(FrozenModel):
    """How a recording becomes an input of the network."""

    kind: Literal["logmel", "waveform"] = "logmel"
    """`logmel`: (n_mels, frames). `waveform`: (samples,), for networks that start from samples."""
    sample_rate: Annotated[int, Field(ge=2000, le=96_000)] = 8000
    """Hz. Recordings at another rate are resampled."""
    length: Annotated[float, Field(gt=0, le=60)] = 1.0
    """Seconds. Longer recordings lose both ends, shorter ones are padded with silence, equally."""
    n_mels: Annotated[int, Field(ge=1, le=512)] = 40
    """Mel bands."""
    window: Fraction = 0.040
    """Seconds of the analysis window."""
    hop: Fraction = 0.020
    """Seconds from one frame to the next."""
    range_db: Annotated[float, Field(gt=0, le=200)] = 40.0
    """Bands more than this many dB below the loudest of their recording count as silence, so that
    the level of the noise a microphone adds weighs less."""
    normalise: Literal["none", "mean", "mean_variance"] = "mean_variance"
    """Per recording: take away the mean (of all bands and frames), or scale to unit variance as well."""

    @property
    def samples(self) -> int:
        """Samples a recording at ``sample_rate``."""
        return max(1, round(self.length * self.sample_rate))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        if self.kind == "waveform":
            return (self.samples,)
        return (self.n_mels, 1 + self.samples // max(1, round(self.hop * self.sample_rate)))


class SpeechPreprocessing(FrozenModel):
    """Files to inputs, always the same way. Saved with the adapted model."""

    features: Features = Features()
    """How a recording becomes an input."""

    def read(self, files: Sequence[Path]) -> Tensor:
        """Inputs for these recordings, (N, n_mels, frames) or (N, samples), float32.

        Raises:
            DataError: a file is missing, unreadable or empty, or no file is given.
            MissingExtraError: soundfile or torchaudio is not installed.
        """
        if not files:
            raise DataError("read needs at least one recording, got none. Check the pattern of the files.")
        blocks = [files[at : at + _BLOCK] for at in range(0, len(files), _BLOCK)]
        return torch.cat([self.transform([read_audio(Path(f)) for f in block]) for block in blocks])

    def transform(self, recordings: Sequence[tuple[Tensor, int]]) -> Tensor:
        """Inputs for recordings in memory, each (samples,) with its sample rate in Hz; at least one."""
        waves = _to_rate(recordings, self.features)
        if self.features.kind == "waveform":
            return normalise(waves, self.features.normalise)
        return torch.cat([log_mel(part, self.features) for part in torch.split(waves, _BATCH)])


def read_audio(file: Path) -> tuple[Tensor, int]:
    """One recording, mixed to mono: (samples,) float32 in [-1, 1], and its sample rate in Hz.

    Raises:
        DataError: the file cannot be read as audio, holds no sample, or samples that are not finite.
    """
    soundfile = require("soundfile", "speech")
    try:
        samples, rate = soundfile.read(str(file), dtype="float32", always_2d=True)
    except (OSError, RuntimeError) as error:  # soundfile.LibsndfileError is a RuntimeError
        raise DataError(
            f"{file} cannot be read as audio: {str(error).rstrip(chr(46))}. Replace it, or leave it out."
        ) from error
    wave = torch.from_numpy(samples).mean(dim=1)
    if wave.numel() == 0 or not bool(wave.isfinite().all()):
        what = "holds no sample" if wave.numel() == 0 else "holds samples that are not finite"
        raise DataError(f"{file} {what}. Replace it, or leave it out.")
    return wave, int(rate)


def fit_length(wave: Tensor, samples: int) -> Tensor:
    """Cut or zero-pad the last dimension to ``samples``, equally at both ends."""
    excess = wave.shape[-1] - samples
    if excess > 0:
        return wave[..., excess // 2 : excess // 2 + samples]
    return torch.nn.functional.pad(wave, (-excess // 2, -excess - -excess // 2))


def _to_rate(recordings: Sequence[tuple[Tensor, int]], features: Features) -> Tensor:
    """All recordings at one rate and length, (N, samples): one resampling for each rate found."""
    functional = require("torchaudio.functional", "speech")
    waves = torch.empty(len(recordings), features.samples)
    for rate in sorted({rate for _, rate in recordings}):
        at = [i for i, (_, own) in enumerate(recordings) if own == rate]
        own_length = max(1, round(features.length * rate))
        stacked = torch.stack([fit_length(recordings[i][0], own_length) for i in at])
        if rate != features.sample_rate:
            stacked = functional.resample(stacked, rate, features.sample_rate)
        waves[at] = fit_length(stacked, features.samples)
    return waves


def log_mel(waves: Tensor, features: Features) -> Tensor:
    """Log-mel spectrogram in units of 10 dB, cut off ``range_db`` below its peak and normalised.

    Args:
        waves: (N, samples) at ``features.sample_rate``.
        features: the settings.

    Returns:
        (N, n_mels, frames) float32, finite for silence too.
    """
    transforms = require("torchaudio.transforms", "speech")
    window = max(1, round(features.window * features.sample_rate))
    spectrogram = transforms.MelSpectrogram(
        sample_rate=features.sample_rate,
        n_fft=2 ** (2 * window - 1).bit_length(),  # padded, so that low mel bands hold a bin each
        win_length=window,
        hop_length=max(1, round(features.hop * features.sample_rate)),
        f_min=20.0,
        n_mels=features.n_mels,
        power=2.0,
        pad_mode="constant",  # silence: reflecting fails where a recording is shorter than the window
    )
    level = spectrogram(waves).clamp_min(_TINY).log10()
    floor = level.amax(dim=(-2, -1), keepdim=True) - features.range_db / 10
    return normalise(level.maximum(floor), features.normalise)


def normalise(inputs: Tensor, how: Literal["none", "mean", "mean_variance"]) -> Tensor:
    """Normalise each recording by its own mean and standard deviation; silence becomes zeros.

    Args:
        inputs: (N, ...).
        how: `none`, `mean`, or `mean_variance`.
    """
    if how == "none":
        return inputs
    over = tuple(range(1, inputs.ndim))
    centred = inputs - inputs.mean(dim=over, keepdim=True)
    if how == "mean":
        return centred
    deviation = centred.square().mean(dim=over, keepdim=True).sqrt()
    return torch.where(deviation > _FLAT, centred / deviation.clamp_min(_FLAT), torch.zeros_like(centred))
