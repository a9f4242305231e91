"""Random augmentation of speech inputs, for few target recordings and for training a source model."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor

from conservtl.bounds import Share
from conservtl.spec_model import FrozenModel
from conservtl.tasks.audio.spectra import BatchDraws, tilt, warp
from conservtl.tasks.audio.waves import WaveAugment, WaveChange
from conservtl.tasks.speech.features import fit_length

__all__ = ["SpeechAugment", "mask", "mix_noise"]


class SpeechAugment(FrozenModel):
    """Random augmentation of a batch; all random numbers come from the given generator.

    Reference:
        Park et al., "SpecAugment", 2019 (masks); Jaitly and Hinton, "Vocal Tract Length Perturbation",
        2013 (stretch of the frequency axis); Ko et al., "Audio Augmentation for Speech Recognition",
        2015 (stretch of the time axis).
    """

    time_shift: Annotated[float, Field(ge=0, le=0.5)] = 0.08
    """Largest shift in time, as a share of the length."""
    time_stretch: Annotated[float, Field(ge=0, lt=0.9)] = 0.0
    """Largest change of speed: 0.2 draws factors between 0.8 and 1.2. Log-mel inputs only."""
    frequency_shift: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Largest shift along the mel axis, as a share of the bands. Log-mel inputs only."""
    frequency_stretch: Annotated[float, Field(ge=0, lt=0.9)] = 0.0
    """Largest stretch of the mel axis: 0.2 draws factors between 0.8 and 1.2. Log-mel inputs only."""
    time_masks: Annotated[int, Field(ge=0, le=20)] = 1
    """Number of spans of frames (or samples) that are masked."""
    time_mask: Share = 0.15
    """Longest span, as a share of the length."""
    frequency_masks: Annotated[int, Field(ge=0, le=20)] = 1
    """Number of spans of mel bands that are masked. Log-mel inputs only."""
    frequency_mask: Share = 0.15
    """Widest span, as a share of the bands."""
    tilt: Annotated[float, Field(ge=0, le=10)] = 0.0
    """Standard deviation of a smooth random offset of the bands (another microphone, another room), in units of the
    input. Log-mel inputs only."""
    noise: Annotated[float, Field(ge=0, le=10)] = 0.0
    """Largest standard deviation of the added noise, in units of the input."""
    waves: WaveAugment | None = None
    """Changes of each recording's samples: speed, room and noise; a babble is for utterances. Inputs on samples only
    (`features.kind` of waveform): spectra are computed once. Null: none."""
    _change: WaveChange | None = PrivateAttr(None)

    def at(self, rate: int) -> SpeechAugment:
        """Return the augmentation of recordings with this sample rate in Hz."""
        if self.waves is None:
            return self
        return self.model_copy().with_change(WaveChange(self.waves, rate))

    def with_change(self, change: WaveChange) -> SpeechAugment:
        """Let this augmentation change samples, and return it."""
        self._change = change
        return self

    def __call__(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        """Return an augmented copy of ``inputs``, (N, bands, frames) or (N, samples), on the same device."""
        draw = BatchDraws(generator, inputs)
        if inputs.ndim == 2:
            if self._change is not None:
                inputs = _changed(inputs, self._change, generator)
            shifted = shift_wave(inputs, draw.symmetric(len(inputs)) * self.time_shift)
            return mix_noise(mask(shifted, -1, self.time_masks, self.time_mask, draw), self.noise, draw)
        return self._spectrogram(inputs, draw)

    def _spectrogram(self, inputs: Tensor, draw: BatchDraws) -> Tensor:
        n = len(inputs)
        out = warp(
            inputs,
            time=(draw.symmetric(n) * self.time_stretch, draw.symmetric(n) * self.time_shift),
            frequency=(draw.symmetric(n) * self.frequency_stretch, draw.symmetric(n) * self.frequency_shift),
        )
        out = mix_noise(tilt(out, self.tilt, draw), self.noise, draw)
        out = mask(out, -1, self.time_masks, self.time_mask, draw)
        return mask(out, -2, self.frequency_masks, self.frequency_mask, draw)


def _changed(inputs: Tensor, change: WaveChange, generator: torch.Generator) -> Tensor:
    """Return (N, samples) whose rows are changed one by one, on the CPU, and cut or padded to their length again."""
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    own = torch.Generator().manual_seed(seed)
    rows = [fit_length(change(row, own), inputs.shape[1]) for row in inputs.cpu()]
    return torch.stack(rows).to(inputs)


def shift_wave(inputs: Tensor, shares: Tensor) -> Tensor:
    """Shift (N, samples) by (N,) shares of the length; the gap becomes silence."""
    samples = inputs.shape[-1]
    at = torch.arange(samples, device=inputs.device) - (shares * samples).round().long().unsqueeze(1)
    inside = (at >= 0) & (at < samples)
    return torch.where(inside, inputs.gather(1, at.clamp(0, samples - 1)), inputs.new_zeros(()))


def mask(inputs: Tensor, dim: int, count: int, widest: float, draw: BatchDraws) -> Tensor:
    """Replace ``count`` random spans along ``dim``, each at most the share ``widest`` of it, by the example's mean."""
    if count == 0 or widest == 0:
        return inputs
    size, n = inputs.shape[dim], len(inputs)
    width = draw.uniform(n, count, 1) * widest * size
    start = draw.uniform(n, count, 1) * (size - width)
    at = torch.arange(size, device=inputs.device)
    masked = ((at >= start) & (at < start + width)).any(dim=1)
    shape = [n] + [1] * (inputs.ndim - 1)
    shape[dim] = size
    mean = inputs.mean(dim=tuple(range(1, inputs.ndim)), keepdim=True)
    return torch.where(masked.view(shape), mean, inputs)


def mix_noise(inputs: Tensor, strongest: float, draw: BatchDraws) -> Tensor:
    """Add white noise whose standard deviation is drawn between 0 and ``strongest`` for each example."""
    if strongest == 0:
        return inputs
    level = strongest * draw.uniform(len(inputs), *[1] * (inputs.ndim - 1))
    return inputs + level * draw.normal(*inputs.shape)
