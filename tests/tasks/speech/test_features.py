"""Features, random changes, networks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conservtl.errors import DataError, SpecError
from conservtl.tasks.speech import Features, ModelSpec, SpeechAugment, SpeechPreprocessing, build
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
    with pytest.raises(DataError, match=r"empty\.wav holds no sample"):
        SpeechPreprocessing().read([tmp_path / "empty.wav"])
    soundfile.write(tmp_path / "nan.wav", torch.full((9,), torch.nan).numpy(), 8000, subtype="FLOAT")
    with pytest.raises(DataError, match="not finite"):
        SpeechPreprocessing().read([tmp_path / "nan.wav"])
    with pytest.raises(DataError, match="got none"):
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


STRONG = SpeechAugment(time_stretch=0.3, frequency_stretch=0.2, frequency_shift=0.1, tilt=0.3, noise=0.3, time_masks=2)


@pytest.mark.parametrize("shape", [(6, 40, 101), (6, 8000)])
@pytest.mark.parametrize("augment", [SpeechAugment(), STRONG])
def test_random_changes_follow_the_generator(shape, augment):
    inputs = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    before, state = inputs.clone(), torch.get_rng_state()
    first, again, other = (augment(inputs, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert first.shape == inputs.shape
    assert first.dtype == inputs.dtype
    assert first.isfinite().all()
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(inputs, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_no_change_leaves_inputs_as_they_are():
    nothing = SpeechAugment(time_shift=0, time_masks=0, frequency_masks=0)
    for shape in ((2, 40, 101), (2, 800)):
        inputs = torch.randn(shape)
        torch.testing.assert_close(nothing(inputs, torch.Generator()), inputs, atol=1e-4, rtol=0)


def test_masks_blank_at_most_what_is_allowed():
    masks = SpeechAugment(time_shift=0, time_masks=1, time_mask=0.2, frequency_masks=1, frequency_mask=0.25)
    inputs = torch.ones(50, 40, 100)
    inputs[:, ::2] = -1
    blank = masks(inputs, torch.Generator().manual_seed(0)).abs() < 0.5
    assert blank.all(dim=1).sum(dim=1).max() <= 21
    assert blank.all(dim=2).sum(dim=1).max() <= 11
    assert blank.any()


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("tc_resnet8", {}),
        ("tc_resnet14", {"norm": "group", "width": 1.0}),
        ("Wav2Letter", {}),
        ("DeepSpeech", {"n_hidden": 16}),
        ("Emformer", {"num_heads": 4, "ffn_dim": 32, "num_layers": 1, "segment_length": 4}),
        ("Conformer", {"num_heads": 4, "ffn_dim": 32, "num_layers": 1, "depthwise_conv_kernel_size": 7}),
    ],
)
def test_networks_give_logits(name, args):
    preprocessing = SpeechPreprocessing()
    model = build(ModelSpec(name=name, args=args), preprocessing, 7)
    assert model.training
    with torch.no_grad():
        assert model(torch.randn(2, *preprocessing.features.shape)).shape == (2, 7)
    assert "head" in dict(model.named_children())


def test_networks_of_samples():
    preprocessing = SpeechPreprocessing(features=Features(kind="waveform", length=0.2, sample_rate=16000))
    small = {
        "extractor_mode": "group_norm",
        "extractor_conv_layer_config": [[8, 10, 5], [8, 3, 2]],
        "extractor_conv_bias": False,
        "encoder_embed_dim": 16,
        "encoder_projection_dropout": 0.1,
        "encoder_pos_conv_kernel": 8,
        "encoder_pos_conv_groups": 2,
        "encoder_num_layers": 2,
        "encoder_num_heads": 2,
        "encoder_attention_dropout": 0.0,
        "encoder_ff_interm_features": 16,
        "encoder_ff_interm_dropout": 0.0,
        "encoder_dropout": 0.0,
        "encoder_layer_norm_first": False,
        "encoder_layer_drop": 0.0,
        "aux_num_out": None,
    }
    model = build(ModelSpec(name="wav2vec2_model", args=small), preprocessing, 4)
    assert model(torch.randn(2, *preprocessing.features.shape)).shape == (2, 4)


def test_the_compact_network_has_blocks_of_one_class():
    model = build(ModelSpec(name="tc_resnet14"), SpeechPreprocessing(), 10)
    assert [name for name, _ in model.named_children()] == ["stem", "blocks", "dropout", "head"]
    assert len(model.blocks) == 6
    assert len({type(block) for block in model.blocks}) == 1


@pytest.mark.parametrize(
    ("spec", "kind", "message"),
    [
        ({"name": "wav2vec_base"}, "logmel", "Did you mean.*'wav2vec2_base'"),
        ({"name": "tc_resnet9"}, "logmel", "Did you mean.*'tc_resnet8'"),
        ({"name": "tc_resnet8", "args": {"widht": 2}}, "logmel", r"model\.args\.widht.*width"),
        ({"name": "tc_resnet8"}, "waveform", "logmel"),
        ({"name": "Conformer"}, "logmel", "num_heads"),
        ({"name": "Tacotron2"}, "logmel", "into frames"),
        ({"name": "Hypothesis"}, "logmel", "got 'Hypothesis'"),
    ],
)
def test_networks_that_cannot_be(spec, kind, message):
    preprocessing = SpeechPreprocessing(features=Features(kind=kind))
    with pytest.raises(SpecError, match=message):
        build(ModelSpec.model_validate(spec), preprocessing, 10)
