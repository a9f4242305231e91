"""Inputs made of recordings."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conservtl.errors import DataError
from conservtl.tasks.speech import Features, SpeechPreprocessing
from conservtl.tasks.speech.features import fit_length

soundfile = pytest.importorskip("soundfile")

PLAIN = Features(range_db=200, normalise="none")


def sine(hertz: float, rate: int, seconds: float = 1.0) -> torch.Tensor:
    return torch.sin(torch.arange(round(rate * seconds)) * 2 * torch.pi * hertz / rate) / 2


def features(wave: torch.Tensor, rate: int = 8000, settings: Features | None = None) -> torch.Tensor:
    return SpeechPreprocessing(features=settings or Features()).transform([(wave, rate)])[0]


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


@pytest.mark.parametrize("offset", [0.1, 0.3, -0.5])
@pytest.mark.parametrize("kind", ["logmel", "waveform"])
def test_an_offset_does_not_matter(offset, kind):
    """Also for a short recording, where the padding is no offset."""
    wave, chosen = sine(440, 8000, 0.5), Features(kind=kind)
    torch.testing.assert_close(features(wave + offset, 8000, chosen), features(wave, 8000, chosen), atol=2e-3, rtol=0)


def word(seconds: float = 0.4, rate: int = 8000, level: float = 0.1) -> torch.Tensor:
    """A rising and falling sum of two tones."""
    envelope = torch.hann_window(round(seconds * rate))
    return level * envelope * (sine(500, rate, seconds) + sine(1200, rate, seconds))


def test_a_click_does_not_hide_the_word():
    """Its own frames differ; the others keep their values up to the normalisation, where they were at the floor."""
    wave = torch.nn.functional.pad(word(), (2400, 2400))
    click = wave.clone()
    click[1000:1016] = torch.tensor([1.0, -1.0]).repeat(8)
    silent = Features(normalise="none")
    clean, clicked = features(wave, settings=silent), features(click, settings=silent)
    apart = [frame for frame in range(51) if not 3 <= frame <= 9]
    torch.testing.assert_close(clicked[:, apart], clean[:, apart], atol=0.25, rtol=0)
    old = features(click, settings=Features(normalise="none", level="peak"))
    assert (old[:, apart] - clean[:, apart]).abs().max() > 1


@pytest.mark.parametrize(("before", "after"), [(0.0, 3.0), (2.0, 3.0), (5.3, 3.0), (2.0, 0.1), (2.0, 0.0)])
@pytest.mark.parametrize("click", [False, True])
def test_the_loudest_second_is_kept(before, after, click):
    """Wherever the word is, it is in the middle of what is kept, as in a recording of the word alone."""
    alone = word()
    long = torch.nn.functional.pad(alone, (round(before * 8000), round(after * 8000)))
    long += 1e-4 * torch.randn(len(long), generator=torch.Generator().manual_seed(0))
    if click:
        long[-400:-380] = 1
    got, expected = (features(wave, settings=PLAIN).amax(0) for wave in (long, alone))
    places = [(level > level.max() - 1).nonzero().float().mean().item() for level in (expected, got)]
    assert places[1] == pytest.approx(places[0], abs=2)
    assert ((got > got.max() - 1).sum() - (expected > expected.max() - 1).sum()).abs() <= 2


def test_the_middle_is_still_kept_on_request():
    wave = torch.arange(24000).remainder(2).mul(2).sub(1) * torch.linspace(0, 1, 24000)
    kept = SpeechPreprocessing(features=Features(kind="waveform", cut="middle", normalise="none", remove_mean=False))
    assert torch.equal(kept.transform([(wave, 8000)])[0], wave[8000:16000])


OLD = {"kind": "logmel", "sample_rate": 8000, "length": 1.0, "n_mels": 40, "window": 0.04, "hop": 0.02}
OLD |= {"range_db": 40.0, "normalise": "mean_variance"}


def test_a_file_from_before_means_what_it_did():
    """The steps by hand, as they were: middle second, peak, no mean subtracted."""
    transforms = pytest.importorskip("torchaudio.transforms")
    functional = pytest.importorskip("torchaudio.functional")
    wave = 0.1 + torch.randn(40000, generator=torch.Generator().manual_seed(0)) * torch.linspace(0, 0.2, 40000)
    mel = transforms.MelSpectrogram(8000, 1024, 320, 160, f_min=20.0, n_mels=40, pad_mode="constant")
    level = mel(functional.resample(wave[12000:28000], 16000, 8000)).clamp_min(1e-10).log10()
    level = level.clamp_min(level.max() - 4)
    expected = (level - level.mean()) / level.std(correction=0)
    old = SpeechPreprocessing.model_validate({"features": OLD})
    torch.testing.assert_close(old.transform([(wave, 16000)])[0], expected, atol=1e-4, rtol=0)
    assert SpeechPreprocessing.model_validate(old.model_dump(mode="json")) == old
    new = SpeechPreprocessing(features=Features(**OLD))
    assert not torch.allclose(new.transform([(wave, 16000)])[0], expected, atol=0.1)


@pytest.mark.parametrize(
    ("channels", "message"),
    [
        (torch.zeros(800, 1), "no sample differs"),
        (torch.full((800, 1), 0.2), "no sample differs"),
        (torch.full((800, 2), 0.2), "no sample differs"),
        (torch.stack([sine(300, 800), -sine(300, 800)], 1), "its 2 channels are mixed, because they cancel"),
        (torch.stack([sine(300, 800), 0.1 - 0.95 * sine(300, 800)], 1), "they cancel"),
    ],
)
def test_silence_is_refused_by_name(tmp_path, channels, message):
    soundfile.write(tmp_path / "still.wav", channels.numpy(), 800, subtype="FLOAT")
    with pytest.raises(DataError, match=rf"still\.wav is silent.*{message}"):
        SpeechPreprocessing().read([tmp_path / "still.wav"])


def test_quiet_and_one_sided_recordings_are_read(tmp_path):
    soundfile.write(tmp_path / "quiet.wav", (sine(300, 8000) * 1e-3).numpy(), 8000, subtype="FLOAT")
    eight = torch.zeros(8000, 8)
    eight[:, 3] = sine(300, 8000)
    soundfile.write(tmp_path / "one.wav", eight.numpy(), 8000, subtype="FLOAT")
    assert SpeechPreprocessing().read([tmp_path / "quiet.wav", tmp_path / "one.wav"]).isfinite().all()


WITHOUT = """
import sys
sys.modules["torchaudio"] = None  # as if it were not installed
import conservtl as ctl
from conservtl.tasks.speech import FolderData, ModelSpec, SpeechCommandsData, build, load
got = load(FolderData(root=sys.argv[1], target="cleo", shots=2), seed=0)
print(build(ModelSpec(), got.preprocessing, 3)(got.shots.inputs).shape)
for use in (
    lambda: build(ModelSpec(name="Wav2Letter"), got.preprocessing, 3),
    lambda: load(SpeechCommandsData(root=sys.argv[1], target="cleo"), seed=0),
):
    try:
        use()
    except ctl.MissingExtraError as error:
        print(error)
"""


def test_a_word_recognizer_needs_no_torchaudio(python, humming):
    done = python("-c", WITHOUT, humming)
    assert done.returncode == 0, done.stderr
    first, *errors = done.stdout.splitlines()
    assert first == "torch.Size([6, 3])"
    assert len(errors) == 2
    assert all("pip install 'conservtl[torchaudio]'" in error for error in errors)
