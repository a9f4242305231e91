"""Augmentation of utterances of different lengths: of their recordings, and SpecAugment of their features."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from conservtl.bounds import Share
from conservtl.spec_model import FrozenModel
from conservtl.tasks.audio.spectra import BatchDraws, tilt, warp
from conservtl.tasks.audio.waves import WaveAugment, at_speed

__all__ = ["SpecAugment"]


class SpecAugment(FrozenModel):
    """Masks spans of frames and of mel bands of each utterance, and changes its voice. Padding counts in no share.

    ``waves`` changes recordings before, where the data has them: speed, room and noise.

    Reference:
        Park et al., "SpecAugment: A Simple Data Augmentation Method for Automatic Speech Recognition",
        Interspeech 2019. Jaitly and Hinton, "Vocal Tract Length Perturbation (VTLP) improves speech recognition", 2013
        (stretch of the mel axis).
    """

    time_masks: Annotated[int, Field(ge=0, le=20)] = 2
    """Number of spans of frames (or samples) that are masked."""
    time_mask: Share = 0.08
    """Longest span, as a share of the utterance."""
    frequency_masks: Annotated[int, Field(ge=0, le=20)] = 2
    """Number of spans of mel bands that are masked. Log-mel inputs only."""
    frequency_mask: Share = 0.2
    """Widest span, as a share of the bands."""
    speed: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Largest change of speed: 0.1 draws a factor between 0.9 and 1.1 for each batch. The pitch stays in log-mel
    inputs; samples are resampled, so it changes too."""
    frequency_stretch: Annotated[float, Field(ge=0, lt=0.9)] = 0.0
    """Largest stretch of the mel axis, as by another vocal tract: 0.2 draws a factor between 0.8 and 1.2 for each
    utterance. Log-mel inputs only."""
    frequency_shift: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Largest shift along the mel axis, as a share of the bands. Log-mel inputs only."""
    tilt: Annotated[float, Field(ge=0, le=10)] = 0.0
    """Standard deviation of a smooth random offset of the bands (another voice, another microphone), in units of the
    input. Log-mel inputs only."""
    noise: Annotated[float, Field(ge=0, le=10)] = 0.0
    """Largest standard deviation of the added noise, in units of the input."""
    waves: WaveAugment | None = None
    """Changes of the recordings before their features are computed; null: none."""

    def __call__(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        """Return an augmented copy of inputs without padding, (N, frames, bands) or (N, samples)."""
        lengths = torch.full((len(inputs),), inputs.shape[1])
        return self.of_batch({"inputs": inputs, "lengths": lengths}, generator)["inputs"]  # type: ignore[no-any-return]

    def of_batch(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        """Return an augmented copy of a padded batch; draws come from ``generator`` alone."""
        inputs, lengths = batch["inputs"], batch["lengths"].to(batch["inputs"].device)

        def uniform(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=generator, device=generator.device).to(inputs.device)

        n = len(inputs)
        if self.speed:
            inputs, lengths = _at_speed(inputs, lengths, 1 + self.speed * (2 * float(uniform(1)) - 1))
        if inputs.ndim == 3 and (self.frequency_stretch or self.frequency_shift or self.tilt):
            inputs = self._voiced(inputs.transpose(1, 2), BatchDraws(generator, inputs)).transpose(1, 2)
        at = torch.arange(inputs.shape[1], device=inputs.device)
        valid = at < lengths.unsqueeze(1)
        if self.noise:
            drawn = torch.randn(inputs.shape, generator=generator, device=generator.device).to(inputs)
            inputs = inputs + self.noise * uniform(n, *[1] * (inputs.ndim - 1)) * drawn
        counts = lengths.unsqueeze(1).float()
        hidden = _spans(uniform, n, self.time_masks, self.time_mask * counts, counts, at)
        if inputs.ndim == 3:
            bands = torch.arange(inputs.shape[2], device=inputs.device)
            width = torch.full_like(counts, inputs.shape[2])
            masked = _spans(uniform, n, self.frequency_masks, self.frequency_mask * width, width, bands)
            inputs = inputs.masked_fill(masked.unsqueeze(1), 0.0)
        dropped = hidden | ~valid
        inputs = inputs.masked_fill(dropped.unsqueeze(-1) if inputs.ndim == 3 else dropped, 0.0)
        return {**batch, "inputs": inputs, "lengths": lengths}

    def _voiced(self, bands: Tensor, draw: BatchDraws) -> Tensor:
        """Return (N, bands, frames) as of other voices; frames stay where they are."""
        n = len(bands)
        if self.frequency_stretch or self.frequency_shift:
            still = bands.new_zeros(n)
            bent = draw.symmetric(n) * self.frequency_stretch, draw.symmetric(n) * self.frequency_shift
            bands = warp(bands, time=(still, still), frequency=bent)
        return tilt(bands, self.tilt, draw)


def _at_speed(inputs: Tensor, lengths: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """Return (N, frames, bands) stretched in time, or (N, samples) resampled, and the lengths of the utterances."""
    if inputs.ndim == 3:
        frames = max(1, round(inputs.shape[1] / factor))
        changed = torch.nn.functional.interpolate(inputs.transpose(1, 2), frames, mode="linear").transpose(1, 2)
    else:
        changed = at_speed(inputs, factor)
    now = changed.shape[1]
    return changed, (lengths.double() * now / inputs.shape[1]).floor().long().clamp(1, now)


def _spans(uniform: Any, n: int, count: int, widest: Tensor, size: Tensor, at: Tensor) -> Tensor:
    """Return (N, positions): true in ``count`` random spans up to (N, 1) ``widest`` of (N, 1) positions."""
    if count == 0:
        return torch.zeros(n, len(at), dtype=torch.bool, device=at.device)
    width = uniform(n, count) * widest
    start = uniform(n, count) * (size - width)
    inside = (at >= start.unsqueeze(-1)) & (at < (start + width).unsqueeze(-1))
    spans: Tensor = inside.any(1)
    return spans
