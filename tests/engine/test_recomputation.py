"""Blocks that are computed again in the backward pass: the same training, in less memory."""

from __future__ import annotations

import copy

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.nn import functional as F

import conservtl as ctl
from conservtl.compat import in_backward
from conservtl.data import Sequences
from conservtl.tasks.transcribe.conformer import ConformerArgs, ConformerCTC
from conservtl.tasks.transcribe.task import Transcribe

TASK = Transcribe()
TRANSFORMERS = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "conv_dim": [8, 8],
    "conv_stride": [5, 2], "conv_kernel": [10, 3], "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2, "layerdrop": 0.5, "hidden_dropout": 0.2,
}  # fmt: skip
TORCHAUDIO = {
    "extractor_mode": "group_norm", "extractor_conv_layer_config": [[8, 10, 5], [8, 3, 2]],
    "extractor_conv_bias": False, "encoder_embed_dim": 16, "encoder_projection_dropout": 0.0,
    "encoder_pos_conv_kernel": 4, "encoder_pos_conv_groups": 2, "encoder_num_layers": 2, "encoder_num_heads": 2,
    "encoder_attention_dropout": 0.0, "encoder_ff_interm_features": 16, "encoder_ff_interm_dropout": 0.0,
    "encoder_dropout": 0.2, "encoder_layer_norm_first": False, "encoder_layer_drop": 0.5,
}  # fmt: skip


def data_of(bands=6):
    generator = torch.Generator().manual_seed(0)
    lengths = (30, 22, 27, 18)
    shape = (bands,) if bands else ()
    factor = 1 if bands else 30
    return Sequences(
        tuple(torch.randn(factor * length, *shape, generator=generator) for length in lengths),
        tuple(torch.randint(1, 5, (3,), generator=generator) for _ in lengths),
        tuple(map(str, lengths)),
        (),
        tuple(length / 10 for length in lengths),
    )


def conformer():
    return ConformerCTC(6, 5, ConformerArgs(width=16, blocks=2, heads=2, subsampling=2, dropout=0.2))


def trained(make, strategies, checkpointing, data, **options):
    """The parameters after three steps, and of each call of a module in a block whether it is a repetition."""
    torch.manual_seed(1)
    model = make()
    source = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    batch = data.batch(range(2))
    adaptation = ctl.adapt(model, source, strategies, example={name: batch[name] for name in ("inputs", "lengths")})
    calls = []
    inner = next(
        m
        for n, m in model.named_modules()
        if n.endswith(("blocks.0.feed_forward1", "layers.0.attention", "layers.0.ffn1", "layers.0.fc1"))
    )
    hook = inner.register_forward_hook(lambda *_: calls.append(in_backward()))
    training = ctl.Training(
        device="cpu", optimizer="sgd", lr=0.1, epochs=3, batch_size=4, checkpointing=checkpointing, **options
    )
    result = ctl.fit(adaptation, data, training=training, forward=TASK.forward, loss=TASK.loss, seed=0)
    hook.remove()
    parameters = {name: one.detach().clone() for name, one in adaptation.model.named_parameters()}
    return parameters, calls, result, adaptation


def check_equal(make, strategies, data, **options):
    plain, once, _, _ = trained(make, strategies, False, data, **options)
    again, twice, result, adaptation = trained(make, strategies, True, data, **options)
    assert not any(once)
    assert twice.count(False) == len(once)
    assert twice.count(True) >= 3
    assert "checkpointing" in result.execution
    for name, value in plain.items():
        torch.testing.assert_close(again[name], value, rtol=1e-5, atol=1e-6, msg=name)
    return adaptation


STRATEGIES = {
    "plain": [],
    "L2-SP and the source's outputs": [ctl.L2SP(alpha=0.1), ctl.OutputConservation(weight=0.5)],
    "features": [ctl.FeatureConservation(alpha=0.3)],
    "features inside a block": [ctl.FeatureConservation(alpha=0.3, layers=("blocks.0", "blocks.1"))],
    "LHUC": [ctl.LHUC()],
    "spectra and a learned input": [ctl.SpectralShrinkage(), ctl.InputTransform()],
    "Mixout": [ctl.Mixout(p=0.5)],
    "frozen input side": [ctl.LayerTransfer(side="input", layers=2)],
    "Fisher": [ctl.FisherSP(alpha=1.0)],
}


@pytest.mark.parametrize("strategies", STRATEGIES.values(), ids=STRATEGIES)
def test_the_conformer_trains_alike(strategies):
    """With dropout: the second computation draws what the first drew."""
    adaptation = check_equal(conformer, strategies, data_of())
    assert all("forward" not in vars(block) for block in adaptation.model.blocks)


def test_accumulated_and_clipped():
    check_equal(
        conformer, [ctl.FeatureConservation(alpha=0.3)], data_of(), step_seconds=9.0, batch_seconds=6.0, clip=0.3
    )


def test_recomputed_activations_are_not_kept_by_taps():
    _, _, _, adaptation = trained(conformer, [ctl.FeatureConservation(alpha=0.3)], True, data_of())
    taps = adaptation.bound.terms._taps
    assert not any(tap.records for tap in taps._taps.values())


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")
@pytest.mark.parametrize("name", ["transformers/wav2vec2", "transformers/hubert", "wav2vec2_model"])
def test_recognizers_on_samples_train_alike(name):
    """Layers and units are dropped at random: both computations drop the same."""
    pytest.importorskip("transformers")
    pytest.importorskip("torchaudio")

    from conservtl.tasks.transcribe.features import Features, TranscribePreprocessing
    from conservtl.tasks.transcribe.models import ModelSpec, build

    args = TRANSFORMERS if "/" in name else TORCHAUDIO
    preprocessing = TranscribePreprocessing(features=Features(kind="waveform", normalise="none"))

    def make():
        return build(ModelSpec(name=name, args=args), preprocessing, 5)

    plain, _, _, _ = trained(make, [ctl.FeatureConservation(alpha=0.3)], False, data_of(bands=0))
    again, calls, _, adaptation = trained(make, [ctl.FeatureConservation(alpha=0.3)], True, data_of(bands=0))
    assert any(calls)
    for key, value in plain.items():
        torch.testing.assert_close(again[key], value, rtol=1e-5, atol=1e-6, msg=key)
    assert not any(getattr(module, "gradient_checkpointing", False) for module in adaptation.model.modules())


@pytest.mark.parametrize("group_norm", [True, False])
def test_torchaudios_conformer(group_norm):
    """With batch norms: refused, unless they keep the source's statistics."""
    pytest.importorskip("torchaudio")
    from conservtl.tasks.transcribe.torchaudio_conformer import TorchaudioConformer, TorchaudioConformerArgs

    sizes = {"input_dim": 16, "num_heads": 2, "ffn_dim": 16, "num_layers": 1, "depthwise_conv_kernel_size": 5}
    args = TorchaudioConformerArgs(**sizes, use_group_norm=group_norm, subsampling=2)

    def make():
        return TorchaudioConformer(6, 5, args)

    if not group_norm:
        with pytest.raises(ctl.SpecError, match="would count each batch twice"):
            trained(make, [], True, data_of())
    parts = [trained(make, [], active, data_of(), batch_norm="eval") for active in (False, True)]
    assert any(parts[1][1])
    for name, value in parts[0][0].items():
        torch.testing.assert_close(parts[1][0][name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_a_decoder_keeps_no_cache_that_would_be_filled_twice():
    """Whisper, with units dropped at random."""
    pytest.importorskip("transformers")
    from conservtl.tasks.transcribe.features import Features, TranscribePreprocessing
    from conservtl.tasks.transcribe.models import ModelSpec, build

    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    args = {
        "d_model": 16,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "max_target_positions": 12,
        "dropout": 0.2,
        **heads,
    }
    preprocessing = TranscribePreprocessing(features=Features(kind="whisper", seconds=1))
    inputs = tuple(torch.randn(100, 80, generator=torch.Generator().manual_seed(n)) for n in range(2))
    data = Sequences(inputs, (torch.tensor([1, 2, 3]), torch.tensor([4])), ("a", "b"), (), (1.0, 1.0))

    def make():
        return build(ModelSpec(name="transformers/whisper", args=args), preprocessing, 7)

    parts = [trained(make, [ctl.OutputConservation(weight=0.3)], active, data) for active in (False, True)]
    assert any(parts[1][1])
    for name, value in parts[0][0].items():
        torch.testing.assert_close(parts[1][0][name], value, rtol=1e-5, atol=1e-6, msg=name)


class Blocks(nn.Module):
    """A model of a user's own, with batch norms in its blocks."""

    def __init__(self, norm):
        super().__init__()
        self.stem = nn.Linear(4, 6)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(6, 6), norm(6), nn.ReLU()) for _ in range(2)])
        self.head = nn.Linear(6, 3)

    def checkpointed_blocks(self):
        return list(self.blocks)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def fitted(model, **options):
    adaptation = ctl.adapt(model, copy.deepcopy(model))
    data = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3
    settings = {"device": "cpu", "epochs": 2, "lr": 0.1, "batch_size": 4, "optimizer": "sgd", **options}
    ctl.fit(adaptation, data, training=ctl.Training(**settings), seed=0, loss=lambda y, b: F.cross_entropy(y, b[1]))
    return adaptation.model.state_dict()


def test_blocks_of_a_users_own_model():
    torch.manual_seed(0)
    model = Blocks(nn.LayerNorm)
    plain, again = (fitted(copy.deepcopy(model), checkpointing=active) for active in (False, True))
    assert all(torch.equal(again[name], value) for name, value in plain.items())
    patched = model.blocks[0].forward = model.blocks[0].forward
    fitted(model, checkpointing=True)
    assert vars(model.blocks[0])["forward"] is patched
    assert "forward" not in vars(model.blocks[1])


def test_batch_norms_are_refused_unless_they_keep_their_statistics():
    torch.manual_seed(0)
    model = Blocks(nn.BatchNorm1d)
    with pytest.raises(ctl.SpecError, match=r"statistics of 'blocks.0.1' would count each batch twice. Set .*batch_no"):
        fitted(copy.deepcopy(model), checkpointing=True)
    options = {"batch_norm": "eval"}
    plain, again = (fitted(copy.deepcopy(model), checkpointing=active, **options) for active in (False, True))
    assert all(torch.equal(again[name], value) for name, value in plain.items())


def test_a_model_without_blocks_is_refused():
    with pytest.raises(ctl.SpecError, match=r"Linear names none: .*checkpointed_blocks\(\).*Leave it out"):
        fitted(nn.Linear(4, 3), checkpointing=True)


def test_the_compiler_is_refused_beside_it():
    with pytest.raises(ValidationError, match="Leave one of them out"):
        ctl.Training(checkpointing=True, compile=True)


def test_a_network_of_timm():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, embed_dim=16, depth=2, num_heads=2, num_classes=3, pretrained=False
    )
    results = []
    for active in (False, True):
        adaptation = ctl.adapt(copy.deepcopy(model), copy.deepcopy(model), [ctl.FeatureConservation(alpha=0.2)])
        images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        training = ctl.Training(device="cpu", epochs=1, lr=0.1, batch_size=4, optimizer="sgd", checkpointing=active)
        ctl.fit(adaptation, (images, torch.tensor([0, 1, 2, 0])), training=training, seed=0)
        results.append(adaptation.model)
        assert not adaptation.model.grad_checkpointing
    for ours, theirs in zip(*(one.parameters() for one in results), strict=True):
        torch.testing.assert_close(ours, theirs)
