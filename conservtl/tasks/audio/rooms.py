"""Rooms: impulse responses, synthetic or recorded, that speech is convolved with."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import AfterValidator, Field
from torch import Tensor

from conservtl.bounds import Place, Share
from conservtl.spec_model import FrozenModel
from conservtl.tasks.audio.noise import Range

__all__ = ["AnyRoom", "RecordedRoom", "SyntheticRoom", "decaying", "reverberated"]


def _ordered(bounds: tuple[float, float]) -> tuple[float, float]:
    if bounds[0] > bounds[1]:
        raise ValueError(f"the shorter time comes first; received {bounds[0]:g} and {bounds[1]:g}")
    return bounds


_Seconds = Annotated[float, Field(gt=0, le=10)]


class SyntheticRoom(FrozenModel):
    """Rooms whose echoes are noise that decays exponentially behind the direct sound.

    Reference:
        Polack, "La transmission de l'énergie sonore dans les salles", 1988 (the model of the decay).
    """

    kind: Literal["synthetic"] = "synthetic"
    """Synthetic rooms."""
    rt60: Annotated[tuple[_Seconds, _Seconds], AfterValidator(_ordered)] = (0.1, 0.6)
    """Shortest and longest reverberation time, in which echoes fall by 60 dB, in seconds."""
    direct: Range = (0.0, 12.0)
    """Lowest and highest level of the direct sound above all echoes together in dB: how near the speaker is."""
    share: Share = 0.3
    """Share of the utterances that are in a room."""


class RecordedRoom(FrozenModel):
    """Recorded impulse responses; one is drawn for each utterance."""

    kind: Literal["files"]
    """Impulse responses below a folder."""
    root: Place
    """The folder; its subfolders are searched too."""
    follow_links: bool = False
    """Whether links may lead out of the folder."""
    share: Share = 0.3
    """Share of the utterances that are in a room."""


AnyRoom = Annotated[SyntheticRoom | RecordedRoom, Field(discriminator="kind")]
"""Spec of rooms, selected by ``kind``."""


def decaying(rt60: float, direct: float, rate: int, generator: torch.Generator) -> Tensor:
    r"""Return an impulse response: 1 at time 0, and behind it noise under an exponential decay.

    .. math:: h_t = g \, \epsilon_t \, 10^{-3 t / \text{rt60}}, \quad \sum_{t > 0} h_t^2 = 10^{-\text{direct} / 10}

    Args:
        rt60: reverberation time in seconds; the response ends there.
        direct: level of the direct sound above all echoes in dB.
        rate: sample rate in Hz.
        generator: gives :math:`\epsilon`.
    """
    samples = max(1, round(rt60 * rate))
    time = torch.arange(1, samples + 1) / rate
    echoes = torch.randn(samples, generator=generator) * 10 ** (-3 * time / rt60)
    echoes = echoes / echoes.square().sum().sqrt().clamp_min(1e-9) * 10 ** (-direct / 20)
    return torch.cat([torch.ones(1), echoes])


def reverberated(wave: Tensor, response: Tensor) -> Tensor:
    """Return speech in a room, (samples,), as long and as loud as before, and not delayed.

    The strongest sample of the impulse response is the direct sound, and the samples before are left out.
    """
    heard = response[int(response.abs().argmax()) :]
    size = len(wave) + len(heard) - 1
    mixed: Tensor = torch.fft.irfft(torch.fft.rfft(wave, size) * torch.fft.rfft(heard, size), size)[: len(wave)]
    return mixed * (wave.square().mean() / mixed.square().mean().clamp_min(1e-20)).sqrt()
