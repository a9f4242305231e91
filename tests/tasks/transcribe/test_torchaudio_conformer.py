"""torchaudio's Conformer as a recognizer by CTC."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import conservtl as ctl
from conservtl.layers import find_layers
from conservtl.tasks.transcribe.features import Features, TranscribePreprocessing
from conservtl.tasks.transcribe.masked_layers import MaskedBatchNorm1d, MaskedGroupNorm1d
from conservtl.tasks.transcribe.models import ModelSpec, build

torchaudio = pytest.importorskip("torchaudio")

SIZES = {"input_dim": 16, "num_heads": 2, "ffn_dim": 16, "num_layers": 2, "depthwise_conv_kernel_size": 5, "dropout": 0}
MELS = TranscribePreprocessing(features=Features(n_mels=12))


def network(**args):
    torch.manual_seed(0)
    return build(ModelSpec(name="torchaudio/conformer", args={**SIZES, **args}), MELS, 7)


@pytest.mark.parametrize("group_norm", [False, True])
@torch.no_grad()
def test_an_utterance_has_the_same_outputs_alone_and_padded(group_norm):
    model = network(use_group_norm=group_norm).eval()
    inputs = torch.randn(2, 60, 12)
    both, frames = model(inputs, torch.tensor([60, 33]))
    alone, _ = model(inputs[1:, :33], torch.tensor([33]))
    assert frames.tolist() == [15, 9]
    torch.testing.assert_close(both[1, :9], alone[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("first", [False, True])
@torch.no_grad()
def test_blocks_are_those_of_torchaudio(first):
    model = network(convolution_first=first).eval()
    plain = torchaudio.models.Conformer(**SIZES, convolution_first=first).eval()
    plain.load_state_dict(model.network.state_dict())
    inputs, lengths = torch.randn(1, 60, 12), torch.tensor([60])
    frames, lengths = model.subsampling(inputs, lengths)
    expected = model.head(plain(frames, lengths)[0])
    torch.testing.assert_close(model(inputs, torch.tensor([60]))[0], expected, rtol=1e-4, atol=1e-5)


def test_features_of_blocks_are_compared_without_padding():
    model, source = network().eval(), network().eval()
    adaptation = ctl.adapt(model, source, [ctl.FeatureConservation(alpha=1.0)])
    with torch.no_grad():
        model.network.conformer_layers[0].ffn1.sequential[1].weight += torch.randn(16, 16)
    inputs, lengths = torch.randn(3, 60, 12), torch.tensor([60, 33, 20])

    def added(inputs):
        content = {"inputs": inputs, "lengths": lengths}
        outputs = model(**content)
        loss = outputs[0].sum() * 0
        return float(adaptation.loss(loss, outputs, content).detach())

    again = inputs.clone()
    again[1, 33:], again[2, 20:] = 3.0, -1.0
    assert added(inputs) > 0
    assert added(again) == pytest.approx(added(inputs), rel=1e-4)


def test_batch_norm_counts_no_padding():
    norm, plain = MaskedBatchNorm1d(nn.BatchNorm1d(3)), nn.BatchNorm1d(3)
    inputs = torch.randn(2, 3, 9)
    norm.lengths = torch.tensor([9, 4])
    rows = torch.cat([inputs[0].T, inputs[1, :, :4].T])
    expected = plain(rows)
    found = norm(inputs)
    torch.testing.assert_close(found[0].T, expected[:9])
    torch.testing.assert_close(found[1, :, :4].T, expected[9:])
    torch.testing.assert_close(norm.running_var, plain.running_var)


def test_group_norm_counts_no_padding():
    norm = MaskedGroupNorm1d(nn.GroupNorm(1, 3))
    nn.init.normal_(norm.weight)
    inputs = torch.randn(2, 3, 9)
    norm.lengths = torch.tensor([9, 4])
    expected = nn.functional.group_norm(inputs[1:, :, :4], 1, norm.weight, norm.bias)
    torch.testing.assert_close(norm(inputs)[1:, :, :4], expected)


def test_layers_run_from_the_convolutions_to_the_head():
    inputs = {"inputs": torch.zeros(2, 40, 12), "lengths": torch.tensor([40, 30])}
    names = [layer.name for layer in find_layers(network().eval(), inputs)]
    assert names[0].startswith("subsampling")
    assert names[-3:] == ["network.conformer_layers.0", "network.conformer_layers.1", "head"]


def test_weights_of_torchaudios_class_are_read_below_the_network():
    plain = torchaudio.models.Conformer(**SIZES)
    model = network()
    plan = ctl.adapt(model, plain).plan
    state = model.state_dict()
    assert all(torch.equal(state["network." + name], value) for name, value in plain.state_dict().items())
    assert {row.layer for row in plan.rows if row.origin == "source"} == {
        f"network.conformer_layers.{place}" for place in (0, 1)
    }


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"num_heads": 3}, r"input_dim must be a multiple of num_heads; received 16 and 3"),
        ({"depthwise_conv_kernel_size": 4}, r"depthwise_conv_kernel_size must be odd; received 4"),
        ({"depth": 4}, r"model.args.depth: .* torchaudio/conformer takes input_dim, num_heads"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(args, message):
    with pytest.raises(ctl.SpecError, match=message):
        network(**args)
