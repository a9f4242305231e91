"""Noise at a level below the speech: synthetic, of other voices, or from recordings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from annotated_types import MinLen
from pydantic import AfterValidator, Field
from torch import Tensor

from conservtl.bounds import Place, Share
from conservtl.spec_model import FrozenModel

__all__ = ["AnyNoise", "Range", "RecordedNoise", "SyntheticNoise", "at_snr", "babble", "coloured", "stretch"]


def _ordered(bounds: tuple[float, float]) -> tuple[float, float]:
    if bounds[0] > bounds[1]:
        raise ValueError(f"the lower bound comes first; received {bounds[0]:g} and {bounds[1]:g}")
    return bounds


Decibels = Annotated[float, Field(ge=-40, le=100)]
Range = Annotated[tuple[Decibels, Decibels], AfterValidator(_ordered)]
"""Bounds of a level in dB, the lower first."""


class SyntheticNoise(FrozenModel):
    """Noise that is made: white, pink, or several voices at once."""

    kind: Literal["synthetic"] = "synthetic"
    """Synthetic noise."""
    colours: Annotated[tuple[Literal["white", "pink", "babble"], ...], MinLen(1)] = ("white", "pink")
    """One is drawn for each utterance. `white`: the same power at all frequencies; `pink`: in each octave; `babble`:
    other utterances of the source at once."""
    voices: Annotated[int, Field(ge=2, le=20)] = 5
    """Utterances in a babble."""
    snr: Range = (10.0, 30.0)
    """Lowest and highest level of the speech above the noise in dB."""
    share: Share = 0.5
    """Share of the utterances to which noise is added."""


class RecordedNoise(FrozenModel):
    """Noise from recordings: a stretch of one of them for each utterance, repeated if it is shorter."""

    kind: Literal["files"]
    """Recordings below a folder."""
    root: Place
    """The folder; its subfolders are searched too."""
    follow_links: bool = False
    """Whether links may lead out of the folder."""
    snr: Range = (10.0, 30.0)
    """Lowest and highest level of the speech above the noise in dB."""
    share: Share = 0.5
    """Share of the utterances to which noise is added."""


AnyNoise = Annotated[SyntheticNoise | RecordedNoise, Field(discriminator="kind")]
"""Spec of noise, selected by ``kind``."""


def coloured(colour: Literal["white", "pink"], samples: int, generator: torch.Generator) -> Tensor:
    """Return noise, (samples,): white, or pink, whose power falls as 1 / frequency and is 0 at frequency 0."""
    white = torch.randn(samples, generator=generator)
    if colour == "white":
        return white
    spectrum = torch.fft.rfft(white)
    frequencies = torch.arange(len(spectrum), dtype=torch.float32)
    falling = torch.where(frequencies > 0, frequencies.clamp_min(1).rsqrt(), 0.0)
    noise: Tensor = torch.fft.irfft(spectrum * falling, samples)
    return noise


def babble(waves: Sequence[Tensor], samples: int, generator: torch.Generator) -> Tensor:
    """Return stretches of recordings at once, all at one level, (samples,)."""
    parts = [stretch(wave, samples, generator) for wave in waves]
    return torch.stack([part / part.square().mean().sqrt().clamp_min(1e-9) for part in parts]).sum(0)


def stretch(wave: Tensor, samples: int, generator: torch.Generator) -> Tensor:
    """Return a random stretch of a recording, (samples,); a shorter recording is repeated from a random sample on."""
    free = len(wave) - samples
    start = int(torch.randint(free + 1 if free >= 0 else len(wave), (), generator=generator))
    if free >= 0:
        return wave[start : start + samples]
    return wave.roll(-start).repeat(-(-samples // len(wave)))[:samples]


def at_snr(wave: Tensor, noise: Tensor, snr: float) -> Tensor:
    r"""Return speech with noise, scaled so that their powers have this ratio; noise without power is left out.

    .. math:: x + n \sqrt{\frac{\overline{x^2}}{\overline{n^2} \, 10^{\text{snr} / 10}}}

    Args:
        wave: (samples,) x.
        noise: (samples,) n.
        snr: in dB.
    """
    power = noise.square().mean()
    if power <= 0:
        return wave
    return wave + noise * (wave.square().mean() / (power * 10 ** (snr / 10))).sqrt()
