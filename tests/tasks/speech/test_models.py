"""Networks by name, with random weights."""

from __future__ import annotations

import pytest
import torch

from conservtl.errors import SpecError
from conservtl.tasks.speech import Features, ModelSpec, SpeechPreprocessing, build

pytest.importorskip("torchaudio")


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
        ({"name": "Hypothesis"}, "logmel", "received 'Hypothesis'"),
    ],
)
def test_networks_that_cannot_be(spec, kind, message):
    preprocessing = SpeechPreprocessing(features=Features(kind=kind))
    with pytest.raises(SpecError, match=message):
        build(ModelSpec.model_validate(spec), preprocessing, 10)
