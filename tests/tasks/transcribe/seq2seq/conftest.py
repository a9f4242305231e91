"""Small models with a decoder, with random weights, and a batch for them."""

from __future__ import annotations

import pytest
import torch

from conservtl.tasks.transcribe.features import Features, TranscribePreprocessing
from conservtl.tasks.transcribe.models import ModelSpec, build

SIZES = {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "max_target_positions": 12,
    "init_std": 0.3,
}
NETWORKS = {
    "whisper": (SIZES, Features(kind="whisper", seconds=1)),
    "speech_to_text": ({**SIZES, "conv_channels": 8, "dropout": 0.0}, Features(kind="fbank", n_mels=20)),
}
LABELS = torch.tensor([[1, 2, 3], [4, -100, -100]])


@pytest.fixture(scope="session")
def network():
    """A function that builds a model of a kind."""

    def make(kind, tokens=7, seconds=None, **args):
        sizes, features = NETWORKS[kind]
        features = features if seconds is None else Features(kind="whisper", seconds=seconds)
        torch.manual_seed(0)
        spec = ModelSpec(name=f"transformers/{kind}", args={**sizes, **args})
        return build(spec, TranscribePreprocessing(features=features), tokens).eval()

    return make


@pytest.fixture(scope="module", params=NETWORKS)
def kind(request):
    pytest.importorskip("transformers")
    return request.param


@pytest.fixture(scope="module")
def bands(kind):
    return NETWORKS[kind][1].n_mels


@pytest.fixture(scope="module")
def model(kind, network):
    return network(kind)


@pytest.fixture(scope="module")
def batch(kind, bands):
    """Two utterances, the second shorter where the model's lengths say so."""
    inputs = torch.randn(2, 100, bands, generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([100, 100 if kind == "whisper" else 63])
    inputs[1, lengths[1] :] = 0
    return {"inputs": inputs, "lengths": lengths, "labels": LABELS, "names": ["a", "b"]}
