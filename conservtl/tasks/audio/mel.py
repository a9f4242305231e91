"""Mel spectrograms by ``torch.stft``, torchaudio's numbers without torchaudio, and their normalisation."""

from __future__ import annotations

import warnings
from typing import Literal

import torch
from torch import Tensor

from conservtl.errors import agreeing, counted

__all__ = ["mel_filters", "mel_power", "normalise", "triangles"]

_FLAT = 1e-5  # standard deviation of silence, which becomes zeros


def mel_power(waves: Tensor, *, rate: int, bands: int, n_fft: int, window: int, hop: int, f_min: float) -> Tensor:
    """Return mel spectrograms of power, as ``torchaudio.transforms.MelSpectrogram`` with zeros beyond the ends.

    Args:
        waves: (N, samples).
        rate: sample rate in Hz.
        bands: number of mel bands, from ``f_min`` to half the sample rate.
        n_fft: length of the transform in samples.
        window: length of the periodic Hann window in samples.
        hop: samples between frames.
        f_min: lowest frequency in Hz.

    Returns:
        (N, bands, 1 + samples // hop).
    """
    hann = torch.hann_window(window, dtype=waves.dtype, device=waves.device)
    # Zeros beyond the ends: reflection fails for a recording shorter than the window.
    spectrum = torch.stft(waves, n_fft, hop, window, hann, center=True, pad_mode="constant", return_complex=True)
    filters = mel_filters(rate, bands, n_fft, f_min).to(waves)
    return torch.matmul(spectrum.abs().square().transpose(-1, -2), filters).transpose(-1, -2)


def mel_filters(rate: int, bands: int, n_fft: int, f_min: float) -> Tensor:
    """Return triangular filters on the mel scale 2595 log10(1 + f / 700), (n_fft // 2 + 1, bands) float32."""
    frequencies = torch.linspace(0, rate // 2, n_fft // 2 + 1)
    low, high = (2595 * torch.log10(1 + torch.tensor(f, dtype=torch.float64) / 700).item() for f in (f_min, rate // 2))
    corners = 700 * (10 ** (torch.linspace(low, high, bands + 2) / 2595) - 1)
    filters = triangles(frequencies, corners)
    if empty := int((filters.amax(dim=0) == 0).sum()):
        warnings.warn(
            f"data.features.n_mels: {counted(empty, 'band', 'contains', of=bands)} no frequency of the "
            f"transform and {agreeing(empty, 'is')} constant. Use fewer bands, or a longer window.",
            stacklevel=2,
        )
    return filters


def triangles(values: Tensor, corners: Tensor) -> Tensor:
    """Return triangles at values, (values, corners - 2), over three rising corners each, with 1 at the middle one."""
    distance, width = corners - values.unsqueeze(1), corners.diff()
    return torch.minimum(-distance[:, :-2] / width[:-1], distance[:, 2:] / width[1:]).clamp_min(0)


def normalise(inputs: Tensor, kind: Literal["none", "mean", "mean_variance"]) -> Tensor:
    """Normalise each recording, (N, ...), by its own mean and standard deviation; silence becomes zeros."""
    if kind == "none":
        return inputs
    over = tuple(range(1, inputs.ndim))
    centred = inputs - inputs.mean(dim=over, keepdim=True)
    if kind == "mean":
        return centred
    deviation = centred.square().mean(dim=over, keepdim=True).sqrt()
    return torch.where(deviation > _FLAT, centred / deviation.clamp_min(_FLAT), torch.zeros_like(centred))
