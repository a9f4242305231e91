"""Inputs made of recordings."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conservtl.errors import DataError
from conservtl.tasks.speech import Features, SpeechPreprocessing
from conservtl.tasks.speech.features import fit_length

soundfile = pytest.importorskip("soundfile")
pytest.importorskip("torchaudio")

PLAIN = Features(range_db=200, normalise="none")


def sine(hertz: float, rate: int, seconds: float = 1.0) -> torch.Tensor:
    return torch.sin(torch.arange(round(rate * seconds)) * 2 * torch.pi * hertz / rate) / 2


def features(wave: torch.Tensor, rate: int = 8000, settings: Features | None = None) -> torch.Tensor:
    return SpeechPreprocessing(features=settings or Features()).transform([(wave, rate)])[0]


def test_importing_the_task_imports_no_extra():
    code = (
        "import conservtl.tasks.speech, sys; print({'torchaudio', 'soundfile', 'espeakng_loader'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("length", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("rate", [8000, 16000, 11025])
def test_shape_is_what_the_settings_say(length, rate):
    """Whatever the recording's own length and rate."""
    chosen = Features(length=length, n_mels=30)
    assert features(sine(440, rate, 0.7), rate, chosen).shape == chosen.shape


def test_each_recording_has_mean_zero_and_variance_one():
    got = features(sine(440, 8000) + 0.01 * torch.randn(8000, generator=torch.Generator().manual_seed(0)))
    assert abs(got.mean()) < 1e-5
    assert abs(got.std() - 1) < 1e-2


@pytest.mark.parametrize("kind", ["logmel", "waveform"])
def test_silence_is_finite(kind):
    got = features(torch.zeros(8000), settings=Features(kind=kind))
    assert torch.equal(got, torch.zeros_like(got))


def test_loudness_does_not_matter():
    wave = sine(440, 8000)
    torch.testing.assert_close(features(wave), features(wave / 50), atol=1e-3, rtol=0)


def test_level_below_the_range_does_not_matter():
    wave = sine(440, 8000)
    hiss = 1e-6 * torch.randn(8000, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(features(wave), features(wave + hiss), atol=2e-2, rtol=0)


@settings(max_examples=10, deadline=None)
@given(hertz=st.floats(150, 3000))
def test_resampling_keeps_the_sound(hertz):
    """A tone at 16 kHz, resampled, is the tone at 8 kHz: the loudest band and its level agree."""
    a, b = features(sine(hertz, 8000), settings=PLAIN), features(sine(hertz, 16000), 16000, PLAIN)
    middle = slice(10, 40)
    assert (a[:, middle].argmax(0) == b[:, middle].argmax(0)).float().mean() > 0.9
    torch.testing.assert_close(a[:, middle].amax(0), b[:, middle].amax(0), atol=0.05, rtol=0)


@given(st.integers(1, 50), st.integers(1, 50))
def test_fitting_keeps_the_centre(have, want):
    wave = torch.arange(1, have + 1).float()
    got = fit_length(wave, want)
    assert got.shape == (want,)
    kept = got[got > 0]
    assert len(kept) == min(have, want)
    assert abs((kept.mean() - wave.mean()).item()) <= 0.5


def test_read_mixes_to_mono_and_repeats_itself(tmp_path: Path):
    left, right = sine(300, 8000), sine(900, 8000)
    soundfile.write(tmp_path / "stereo.wav", torch.stack([left, right], 1).numpy(), 8000, subtype="FLOAT")
    soundfile.write(tmp_path / "mono.flac", ((left + right) / 2).numpy(), 8000)
    preprocessing = SpeechPreprocessing()
    both = preprocessing.read([tmp_path / "stereo.wav", tmp_path / "mono.flac"])
    torch.testing.assert_close(both[0], both[1], atol=0.05, rtol=0)
    assert torch.equal(both, preprocessing.read([tmp_path / "stereo.wav", tmp_path / "mono.flac"]))


def test_read_refuses_what_is_no_recording(tmp_path: Path):
    with pytest.raises(DataError, match=r"gone\.wav"):
        SpeechPreprocessing().read([tmp_path / "gone.wav"])
    soundfile.write(tmp_path / "empty.wav", torch.zeros(0).numpy(), 8000)
    with pytest.raises(DataError, match=r"empty\.wav has no samples"):
        SpeechPreprocessing().read([tmp_path / "empty.wav"])
    soundfile.write(tmp_path / "nan.wav", torch.full((9,), torch.nan).numpy(), 8000, subtype="FLOAT")
    with pytest.raises(DataError, match="not finite"):
        SpeechPreprocessing().read([tmp_path / "nan.wav"])
    with pytest.raises(DataError, match="received none"):
        SpeechPreprocessing().read([])


def test_preprocessing_survives_json():
    chosen = SpeechPreprocessing(features=Features(sample_rate=16000, n_mels=64))
    assert SpeechPreprocessing.model_validate_json(chosen.model_dump_json()) == chosen


@pytest.mark.parametrize(
    "chosen",
    [
        Features(length=0.01),
        Features(hop=0.5),
        Features(sample_rate=2000, n_mels=8),
        Features(window=0.001, hop=0.001, n_mels=4, length=0.1),
    ],
)
def test_unusual_settings_work(chosen):
    got = features(sine(440, 8000), settings=chosen)
    assert got.shape == chosen.shape
    assert got.isfinite().all()
