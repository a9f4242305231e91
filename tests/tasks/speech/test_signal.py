"""Mel spectrograms and resampling: torchaudio's numbers without torchaudio."""

from __future__ import annotations

import pytest
import torch

from conservtl.tasks.audio.mel import mel_filters, mel_power
from conservtl.tasks.audio.resampling import resample

PAIRS = [(16000, 8000), (8000, 16000), (44100, 16000), (48000, 16000), (11025, 8000), (8000, 8001), (1000, 3)]


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize(("rate", "bands", "n_fft"), [(8000, 40, 1024), (16000, 80, 2048), (11025, 30, 1024)])
def test_mel_power_is_torchaudios(rate, bands, n_fft):
    transforms = pytest.importorskip("torchaudio.transforms")
    window, hop = rate // 25, rate // 50
    theirs = transforms.MelSpectrogram(rate, n_fft, window, hop, f_min=20.0, n_mels=bands, pad_mode="constant")
    waves = noise(3, rate + 77).float()
    ours = mel_power(waves, rate=rate, bands=bands, n_fft=n_fft, window=window, hop=hop, f_min=20.0)
    torch.testing.assert_close(ours, theirs(waves), rtol=1e-5, atol=1e-8)


def test_a_tone_is_in_the_band_of_its_mel():
    """By hand: 1,000 Hz is 1,000 mel; of 9 bands from 20 Hz (31.7 mel) to 4 kHz (2,146.1) the 4th peaks at 877.5 mel
    (825 Hz) and the 5th at 1,088.9 (1,140 Hz), so that they share the tone 44 to 56."""
    tone = torch.sin(torch.arange(8000) * 2 * torch.pi * 1000 / 8000).unsqueeze(0)
    power = mel_power(tone, rate=8000, bands=9, n_fft=1024, window=320, hop=160, f_min=20.0)[0, :, 25]
    assert power.topk(2).indices.tolist() == [4, 3]
    assert (power[4] / power.sum()).item() == pytest.approx(0.557, abs=0.02)


def test_empty_bands_are_named():
    with pytest.warns(UserWarning, match=r"data\.features\.n_mels: \d+ of 128 bands contain no frequency"):
        mel_filters(8000, 128, 64, 20.0)


@pytest.mark.parametrize(("rate", "to"), PAIRS)
def test_resampling_is_torchaudios(rate, to):
    functional = pytest.importorskip("torchaudio.functional")
    waves = noise(2, rate // 2 + 7)
    torch.testing.assert_close(resample(waves, rate, to), functional.resample(waves, rate, to), rtol=0, atol=1e-10)


@pytest.mark.parametrize(("rate", "to"), [*PAIRS[:-1], (44099, 16000), (15999, 16000)])
def test_a_tone_is_the_tone_at_the_other_rate(rate, to):
    """The window of six crossings lets 0.2 % of error through in the middle of the band."""
    seconds = 0.25
    tones = [
        torch.sin(torch.arange(int(seconds * r), dtype=torch.float64) * 2 * torch.pi * 440 / r) for r in (rate, to)
    ]
    got = resample(tones[0].unsqueeze(0), rate, to)[0]
    inside = slice(to // 50, len(tones[1]) - to // 50)
    torch.testing.assert_close(got[inside], tones[1][inside], rtol=0, atol=4e-3)


MEMORY = """
import resource, torch
from conservtl.tasks.audio.resampling import resample
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
resample(torch.zeros(1, 1000), 3, 2)
before = peak()
resample(torch.zeros(4, 44099), 44099, 16000)
print((peak() - before) / 1024)
"""


def test_the_memory_of_resampling_is_bounded(python):
    """44,099 and 16,000 have no common divisor: a table of all weights would have 700 million of them."""
    pytest.importorskip("resource")
    done = python("-c", MEMORY)
    assert float(done.stdout) < 100  # MiB
