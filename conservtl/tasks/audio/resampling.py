"""Resampling between any two rates in bounded memory."""

from __future__ import annotations

from math import ceil, gcd, pi

import torch
from torch import Tensor

__all__ = ["resample"]

_ZEROS = 6  # zero crossings of the sinc at each side
_ROLLOFF = 0.99  # cut-off as a share of the lower Nyquist frequency
_PRODUCTS = 2**22  # products in memory at once


def resample(waves: Tensor, rate: int, to: int) -> Tensor:
    """Resample (N, samples) between rates in Hz, as ``torchaudio.functional.resample`` does with its defaults.

    The kernel is a sinc under a Hann window. Outputs at one distance from the input before them share their weights,
    and are computed together: memory does not grow with the number of distances, which is large for rates with a small
    common divisor.

    Returns:
        (N, ceil(samples * to / rate)).
    """
    if rate == to or waves.shape[-1] == 0:
        return waves
    common = gcd(rate, to)
    step, phases = rate // common, to // common
    reach = ceil(_ZEROS * step / (min(step, phases) * _ROLLOFF))
    length = -(-waves.shape[-1] * phases // step)
    padded = torch.nn.functional.pad(waves, (reach, reach + step + 1))
    out = waves.new_empty(len(waves), length)
    for phase in range(min(phases, length)):
        first, rest = divmod(phase * step, phases)
        weights = _weights(rest / phases, reach, step, phases).to(waves)
        windows = padded[:, first:].unfold(1, len(weights), step)[:, : len(range(phase, length, phases))]
        block = max(1, _PRODUCTS // windows[0].numel())
        for row in range(0, len(waves), block):
            out[row : row + block, phase::phases] = windows[row : row + block] @ weights
    return out


def _weights(fraction: float, reach: int, step: int, phases: int) -> Tensor:
    """Return the weights of ``2 * reach + 2`` neighbouring inputs for one output, float64.

    Args:
        fraction: distance of the output from the input before it, in input samples.
        reach: inputs at each side.
        step: input rate over the common divisor.
        phases: output rate over the common divisor.
    """
    cut = min(step, phases) * _ROLLOFF / step  # as a share of the input's Nyquist frequency
    distance = torch.arange(-reach, reach + 2, dtype=torch.float64) - fraction
    time = (distance * cut).clamp(-_ZEROS, _ZEROS)
    return cut * torch.cos(time * pi / _ZEROS / 2).square() * torch.sinc(time)
