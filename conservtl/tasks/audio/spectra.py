"""Random changes of batches of spectrograms: stretches, shifts and the sound of a microphone or a room."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["BatchDraws", "tilt", "warp"]


class BatchDraws:
    """Random numbers for one batch, drawn on the generator's device and moved to the inputs' device."""

    def __init__(self, generator: torch.Generator, like: Tensor) -> None:
        self.generator, self.like = generator, like

    def uniform(self, *shape: int) -> Tensor:
        """Return numbers between 0 and 1."""
        drawn = torch.rand(*shape, generator=self.generator, device=self.generator.device)
        return drawn.to(self.like)

    def symmetric(self, *shape: int) -> Tensor:
        """Return numbers between -1 and 1."""
        return 2 * self.uniform(*shape) - 1

    def normal(self, *shape: int) -> Tensor:
        """Return numbers of a standard normal distribution."""
        drawn = torch.randn(*shape, generator=self.generator, device=self.generator.device)
        return drawn.to(self.like)


def warp(inputs: Tensor, time: tuple[Tensor, Tensor], frequency: tuple[Tensor, Tensor]) -> Tensor:
    """Stretch spectrograms about their centre and shift them, along both axes; edge values are repeated outside.

    Args:
        inputs: (N, bands, frames).
        time: (N,) relative changes of speed and (N,) shifts as a share of the length.
        frequency: the same for the mel axis.
    """
    matrix = inputs.new_zeros(len(inputs), 2, 3)
    matrix[:, 0, 0], matrix[:, 0, 2] = 1 + time[0], 2 * time[1]
    matrix[:, 1, 1], matrix[:, 1, 2] = 1 + frequency[0], 2 * frequency[1]
    size = [len(inputs), 1, *inputs.shape[1:]]
    grid = torch.nn.functional.affine_grid(matrix, size, align_corners=False)
    warped = torch.nn.functional.grid_sample(
        inputs.unsqueeze(1), grid, mode="bilinear", padding_mode="border", align_corners=False
    )
    return warped.squeeze(1)


def tilt(inputs: Tensor, strength: float, draw: BatchDraws) -> Tensor:
    """Add to each band a smooth random offset: a sum of three cosines along the mel axis."""
    if strength == 0:
        return inputs
    bands = inputs.shape[1]
    position = (torch.arange(bands, device=inputs.device, dtype=inputs.dtype) + 0.5) / bands
    waves = torch.stack([torch.cos(torch.pi * k * position) / k for k in (1, 2, 3)])
    return inputs + (strength * draw.normal(len(inputs), 3) @ waves).unsqueeze(-1)
