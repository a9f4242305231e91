"""Features of Whisper and Speech2Text: the numbers of transformers' extractors."""

from __future__ import annotations

import pytest
import torch

import conservtl as ctl
from conservtl.tasks.transcribe.features import Features

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def wave():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(12_345, generator=generator) * torch.linspace(0, 0.2, 12_345)


@pytest.mark.parametrize("bands", [80, 128])
def test_whisper_has_the_numbers_of_its_extractor(wave, bands):
    extract = transformers.WhisperFeatureExtractor(feature_size=bands)
    expected = extract(wave.numpy(), sampling_rate=16_000, return_tensors="pt").input_features[0].T
    found = Features(kind="whisper", n_mels=bands)(wave, 16_000)
    assert found.shape == (3000, bands)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_a_shorter_whisper_is_the_extractor_with_a_shorter_chunk(wave):
    extract = transformers.WhisperFeatureExtractor(chunk_length=2)
    expected = extract(wave.numpy(), sampling_rate=16_000, return_tensors="pt").input_features[0].T
    torch.testing.assert_close(Features(kind="whisper", seconds=2)(wave, 16_000), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("bands", [80, 40])
def test_speech2text_has_the_numbers_of_its_extractor(wave, bands):
    extract = transformers.Speech2TextFeatureExtractor(feature_size=bands, num_mel_bins=bands)
    expected = extract(wave.numpy(), sampling_rate=16_000, return_tensors="pt").input_features[0]
    found = Features(kind="fbank", n_mels=bands)(wave, 16_000)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_a_recording_at_another_rate_is_resampled_first():
    time = torch.arange(8000) / 8000
    slow = Features(kind="whisper", seconds=1)(0.1 * torch.sin(2 * torch.pi * 440 * time), 8000)
    time = torch.arange(16_000) / 16_000
    fast = Features(kind="whisper", seconds=1)(0.1 * torch.sin(2 * torch.pi * 440 * time), 16_000)
    assert float((slow[5:95] - fast[5:95])[fast[5:95] > 0.8].abs().max()) < 0.01


def test_a_click_shorter_than_a_window_has_one_frame():
    assert Features(kind="fbank")(torch.ones(20), 16_000).shape == (1, 80)


def test_a_recording_beyond_the_positions_is_refused(wave):
    with pytest.raises(ctl.DataError, match=r"must be at most data.features.seconds long, 1 s; it has 1.54 s"):
        Features(kind="whisper", seconds=1)(wave, 8000)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "whisper", "sample_rate": 8000}, r"sample_rate must be 16000 for the kind 'whisper'; received 8000"),
        ({"kind": "whisper", "normalise": "bands"}, r"normalise must be 'none' for the kind 'whisper'"),
        ({"kind": "whisper", "hop": 0.02}, r"hop must be 0.01 for the kind 'whisper'; received 0.02"),
        ({"kind": "fbank", "range_db": 80}, r"range_db must be 40.0 for the kind 'fbank'"),
        ({"kind": "logmel", "seconds": 10}, r"seconds must be 30.0 for the kind 'logmel'; received 10"),
    ],
)
def test_a_setting_that_a_kind_does_not_have_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Features(**fields)


@pytest.mark.parametrize("kind", ["logmel", "waveform", "whisper", "fbank"])
def test_settings_come_back_from_their_json(kind):
    features = Features(kind=kind)
    assert Features.model_validate(features.model_dump(mode="json")) == features
