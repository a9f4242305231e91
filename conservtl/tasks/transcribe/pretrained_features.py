"""Features that pretrained encoders and decoders were trained on: Whisper's log-mel and Kaldi's filter banks.

Both are the numbers of transformers' feature extractors, computed by torch.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from conservtl.errors import DataError
from conservtl.tasks.audio.mel import triangles

__all__ = ["WHISPER_RATE", "kaldi_fbank", "whisper_log_mel"]

WHISPER_RATE = 16_000
"""Sample rate in Hz of every Whisper."""

_FFT, _HOP = 400, 160  # of Whisper, in samples
_TINY = torch.finfo(torch.float32).eps  # least energy in Kaldi


def whisper_log_mel(wave: Tensor, bands: int, seconds: float) -> Tensor:
    """Return Whisper's log-mel spectrogram of a recording at 16 kHz, (100 * seconds, bands), with silence behind it.

    Raises:
        DataError: the recording is longer.

    Reference:
        Radford et al. 2022, "Robust Speech Recognition via Large-Scale Weak Supervision", section 2.2.
    """
    samples = round(seconds * WHISPER_RATE)
    if len(wave) > samples:
        raise DataError(
            f"must be at most data.features.seconds long, {seconds:g} s; it has {len(wave) / WHISPER_RATE:.2f} s. "
            "Leave it out, or cut it"
        )
    padded = F.pad(wave, (0, samples - len(wave)))
    window = torch.hann_window(_FFT, device=wave.device)
    power = torch.stft(padded, _FFT, _HOP, window=window, return_complex=True)[..., :-1].abs().square()
    values = (_slaney_filters(bands).to(wave.device) @ power).clamp_min(1e-10).log10()
    return ((values.maximum(values.max() - 8) + 4) / 4).T.contiguous()


def kaldi_fbank(wave: Tensor, rate: int, bands: int) -> Tensor:
    """Return Kaldi's log filter banks of windows of 25 ms every 10 ms, (frames, bands); no dither.

    The samples are in [-1, 1]; the mel bands are from 20 Hz to half the rate.
    """
    window, hop = int(rate * 0.025), int(rate * 0.010)
    scaled = F.pad(wave, (0, max(0, window - len(wave)))) * 2**15
    frames = scaled.unfold(0, window, hop)
    frames = frames - frames.mean(1, keepdim=True)
    before = torch.cat([frames[:, :1], frames[:, :-1]], 1)
    povey = torch.hann_window(window, periodic=False, device=wave.device) ** 0.85
    size = 2 ** (window - 1).bit_length()
    power = torch.fft.rfft((frames - 0.97 * before) * povey, size).abs().square()
    energies: Tensor = power @ _kaldi_filters(rate, bands, size).to(wave.device)
    return energies.clamp_min(_TINY).log()


@lru_cache(maxsize=4)
def _slaney_filters(bands: int) -> Tensor:
    """Return (bands, frequencies): triangles of equal area, linear in Hz up to 1 kHz and logarithmic above."""
    step = math.log(6.4) / 27
    top = 15 + math.log(8) / step
    mel = torch.linspace(0, top, bands + 2, dtype=torch.float64)
    corners = torch.where(mel < 15, mel * 200 / 3, 1000 * ((mel - 15) * step).exp())
    hertz = torch.linspace(0, WHISPER_RATE // 2, _FFT // 2 + 1, dtype=torch.float64)
    area = 2 / (corners[2:] - corners[:-2])
    return (triangles(hertz, corners) * area).T.float()


@lru_cache(maxsize=4)
def _kaldi_filters(rate: int, bands: int, size: int) -> Tensor:
    """Return (frequencies, bands): triangles on the mel scale 1127 ln(1 + f / 700), none at half the rate."""
    low, high = (1127 * math.log(1 + f / 700) for f in (20.0, rate / 2))
    corners = low + (high - low) * torch.arange(bands + 2, dtype=torch.float64) / (bands + 1)
    mel = 1127 * (1 + torch.arange(size // 2, dtype=torch.float64) * rate / size / 700).log()
    return F.pad(triangles(mel, corners), (0, 0, 0, 1)).float()
