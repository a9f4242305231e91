"""Recordings in files as samples, and the stretch of them that holds the sound."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from conservtl.errors import DataError
from conservtl.extras import require

__all__ = ["digest", "loudest_stretch", "read_audio"]

_STEP = 2**-15  # one step of 16-bit samples
_CANCELLED = 0.1  # of the channels' level: a sum of fewer than 100 channels of different sounds is above
_FRAME = 0.010  # seconds
_CLICK = 4  # frames that a click can be in
_NEARLY = 0.99  # of the largest energy


def read_audio(file: Path) -> tuple[Tensor, int]:
    """Return a recording, mixed to mono: (samples,) float32 in [-1, 1], and its sample rate in Hz.

    Raises:
        DataError: the file cannot be read as audio, has no samples or samples that are not finite, is silent, or its
            channels cancel when they are mixed.
    """
    soundfile = require("soundfile", "speech")
    try:
        samples, rate = soundfile.read(str(file), dtype="float32", always_2d=True)
    except (OSError, RuntimeError) as error:  # soundfile.LibsndfileError is a RuntimeError
        raise DataError(
            f"{file} cannot be read as audio: {str(error).rstrip(chr(46))}. Replace or remove it."
        ) from error
    channels = torch.from_numpy(samples)
    wave = channels.mean(dim=1)
    if fault := _fault(channels, wave):
        raise DataError(f"{file} {fault}. Replace or remove it.")
    return wave, int(rate)


def _fault(channels: Tensor, wave: Tensor) -> str | None:
    if wave.numel() == 0:
        return "has no samples"
    if not bool(channels.isfinite().all()):
        return "has samples that are not finite"
    centred, mixed = channels - channels.mean(dim=0), wave - wave.mean()
    if centred.abs().max() <= _STEP:
        return "is silent: no sample differs from the mean by more than one step of 16 bits"
    if mixed.square().mean().sqrt() < _CANCELLED * centred.square().mean().sqrt():
        return f"is silent when its {channels.shape[1]} channels are mixed, because they cancel: one is inverted"
    return None


def digest(wave: Tensor, rate: int) -> str:
    """Return a digest of a recording's samples, the same for a copy in another lossless format."""
    return hashlib.sha256(str(rate).encode() + wave.contiguous().numpy().tobytes()).hexdigest()


def loudest_stretch(wave: Tensor, rate: int, length: int) -> Tensor:
    """Return the ``length`` samples with the most energy, where no frame counts more than the fifth loudest.

    Args:
        wave: (samples,), more than ``length``, without an offset.
        rate: sample rate in Hz.
        length: of the stretch, in samples.
    """
    frame = max(1, min(round(_FRAME * rate), length))
    energy = wave[: len(wave) // frame * frame].view(-1, frame).square().sum(dim=1).double()
    energy = energy.minimum(energy.topk(min(_CLICK + 1, len(energy))).values[-1])
    total = torch.nn.functional.pad(energy.cumsum(0), (1, 0))
    frames = min(-(-length // frame), len(energy))
    sums = total[frames:] - total[:-frames]
    # Every stretch around the loudest that holds nearly as much: the middle one has the sound in its middle.
    loudest, less = int(sums.argmax()), (sums < _NEARLY * sums.max()).nonzero().flatten()
    first = int(less[less < loudest].max()) + 1 if (less < loudest).any() else 0
    last = int(less[less > loudest].min()) - 1 if (less > loudest).any() else len(sums) - 1
    start = (first + last) // 2 * frame
    start = max(0, min(start, len(wave) - length))
    return wave[start : start + length]
