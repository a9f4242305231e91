"""Hums, sensors, and the preprocessing of recordings in files."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from conservtl import DataError
from conservtl.data import Examples
from conservtl.spec_model import FrozenModel

SAMPLES = 128


def hums(count: int, sensor: str, noise: float, seed: int) -> Examples:
    """Draw hums: inputs (count, SAMPLES), and as labels (count, 1) their pitch in octaves above a reference."""
    generator = torch.Generator().manual_seed(seed)
    pitch = torch.rand(count, 1, generator=generator)
    phase = 2 * math.pi * torch.rand(count, 1, generator=generator)
    time = torch.arange(SAMPLES) / SAMPLES
    cycles = 8 * 2**pitch * (1.12 if sensor == "slow clock" else 1.0)  # a slow clock takes fewer samples a cycle
    wave = torch.sin(2 * math.pi * cycles * time + phase)
    if sensor == "muffled":
        wave = torch.nn.functional.avg_pool1d(wave, 5, 1, 2)
    if sensor == "mains hum":
        wave = wave + 0.8 * torch.sin(2 * math.pi * 5 * time)
    inputs = normalise(wave + noise * torch.randn(count, SAMPLES, generator=generator))
    return Examples(inputs, pitch, tuple(f"{sensor} {seed} {number}" for number in range(count)))


def normalise(waves: Tensor) -> Tensor:
    """Scale each recording to mean 0 and standard deviation 1."""
    centred = waves - waves.mean(-1, keepdim=True)
    return centred / centred.std(-1, keepdim=True).clamp_min(1e-6)


class PitchPreprocessing(FrozenModel):
    """Reads recordings from text files with one sample a line. Saved with the adapted model."""

    kind: Literal["pitch"] = "pitch"
    """Tells this record from those of other tasks."""

    def read(self, files: Sequence[Path]) -> Tensor:
        """Return the inputs, (N, SAMPLES).

        Raises:
            DataError: a file does not hold SAMPLES numbers.
        """
        return normalise(torch.stack([self._wave(file) for file in files]))

    def _wave(self, file: Path) -> Tensor:
        try:
            wave = torch.tensor([float(line) for line in file.read_text().split()])
        except ValueError as error:
            raise DataError(f"{file}: each line must be a number; {error}. Write one sample a line.") from error
        if len(wave) != SAMPLES:
            raise DataError(f"{file} must hold {SAMPLES} samples; it holds {len(wave)}. Cut or repeat it.")
        return wave
