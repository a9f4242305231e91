"""The axis of channels, found from a module's own output; DELTA with attention on channels last, by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import conservtl as ctl
from conservtl.experiments.advice.layer_features import features_of
from conservtl.layers import find_layers
from conservtl.runtime.layer_features import Channels, channel_axis

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1, 2, 0])


class Permute(nn.Module):
    def __init__(self, *dims):
        super().__init__()
        self.dims = list(dims)

    def forward(self, x):
        return x.permute(self.dims)


class LayerNorm2d(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    """Permutes by itself, adds its input."""

    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm, self.one, self.two = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        inner = self.two(F.gelu(self.one(self.norm(self.conv(x).permute(0, 2, 3, 1)))))
        return x + inner.permute(0, 3, 1, 2)


class GatedConvBlock(nn.Module):
    """Channels last around a convolution, as MambaOut."""

    def __init__(self, width):
        super().__init__()
        self.norm, self.one = nn.LayerNorm(width), nn.Linear(width, 2 * width)
        self.conv = nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width)
        self.two = nn.Linear(2 * width, width)

    def forward(self, x):
        inner = self.conv(self.one(self.norm(x)).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + self.two(inner)


def stem(width):
    return nn.Sequential(nn.Conv2d(3, width, 3, padding=1), Permute(0, 2, 3, 1), nn.LayerNorm(width))


class ChannelsLast(nn.Module):
    def __init__(self, width=5):
        super().__init__()
        self.stem, self.block = stem(width), GatedConvBlock(width)
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        return self.head(self.block(self.stem(x)).mean((1, 2)))


@pytest.mark.parametrize("width", [5, 8], ids=["told by the size", "as wide as high"])
@pytest.mark.parametrize(
    ("make", "axis"),
    [
        (stem, 3),
        (GatedConvBlock, 3),
        (ConvNeXtBlock, 1),
        (lambda width: nn.Sequential(ConvNeXtBlock(width), Permute(0, 2, 3, 1), nn.Linear(width, width)), 3),
        (lambda width: nn.Sequential(nn.Conv2d(3, width, 3, padding=1), LayerNorm2d(width)), 1),
        (lambda width: nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.GroupNorm(1, width), nn.ReLU()), 1),
        (
            lambda width: nn.Sequential(
                nn.Conv2d(width, width, 3, padding=1),
                Permute(0, 2, 3, 1),
                nn.LayerNorm(width),
                nn.Linear(width, width),
                Permute(0, 3, 1, 2),
            ),
            1,
        ),
    ],
)
def test_where_the_channels_are(make, axis, width):
    shape = [4, 8, 8, 8]
    shape[axis] = width
    assert channel_axis(make(width), torch.empty(shape)) == axis


def test_an_output_that_told_decides_for_those_that_do_not():
    """Eight frames of eight channels, in a run whose other batches have other numbers of frames."""

    class Turns(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 8)

        def forward(self, x):
            return self.linear(x).transpose(1, 2)

    class Gated(Turns):
        def __init__(self):
            super().__init__()
            self.linear = nn.Conv1d(4, 16, 3)  # halved by a gated linear unit

    assert Channels(Gated()).axis(torch.empty(2, 5, 8)) == 2
    channels = Channels(Turns())
    assert channels.axis(torch.empty(2, 8, 5)) == 1
    assert channels.axis(torch.empty(2, 8, 8)) == 1
    assert channels.axis(torch.empty(2, 8)) == 1


def test_real_models():
    torchvision = pytest.importorskip("torchvision")
    swin = torchvision.models.swin_transformer.SwinTransformer([4, 4], 12, [1, 1], [2, 2], [4, 4], num_classes=3)
    assert channel_axis(swin.features[0], swin.features[0](torch.zeros(1, 3, 48, 48))) == 3  # 12 wide, 12 high
    assert channel_axis(swin.features[1][0], torch.zeros(1, 12, 12, 12)) == 3
    block = torchvision.models.convnext.CNBlock(6, 1e-6, 0.0)
    assert channel_axis(block, torch.zeros(1, 6, 6, 6)) == 1
    timm = pytest.importorskip("timm")
    model = timm.create_model("mambaout_femto", depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), num_classes=3)
    maps = model.stem(torch.zeros(1, 3, 32, 32))
    assert channel_axis(model.stem, maps) == channel_axis(model.stages[0].blocks[0], maps) == 3
    model = timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), num_classes=3)
    maps = model.stem(torch.zeros(1, 3, 32, 32))
    assert maps.shape == (1, 8, 8, 8)
    assert channel_axis(model.stem, maps) == channel_axis(model.stages[0].blocks[0], maps) == 1


def adapted(*strategies):
    torch.manual_seed(0)
    source, model = ChannelsLast().double(), ChannelsLast().double()
    layers = ["stem", "block", "head"]
    return ctl.adapt(model, source, strategies, example=X.double(), layers=layers), source


def test_delta_with_attention():
    """By one forward pass for each channel of each layer, and by the formula with loops."""
    adaptation, source = adapted(ctl.FeatureConservation(alpha=0.7, attention=True))
    model, x = adaptation.model.eval(), X.double()
    adaptation.measure([(x, Y)])
    weights = {}
    with torch.no_grad():
        plain = F.cross_entropy(source(x), Y)
        for layer in ("stem", "block"):
            rises = []
            for channel in range(5):
                maps = source.stem(x)
                if layer == "stem":
                    maps[..., channel] = 0
                maps = source.block(maps)
                if layer == "block":
                    maps[..., channel] = 0
                rises.append(F.cross_entropy(source.head(maps.mean((1, 2))), Y) - plain)
            weights[layer] = 5 * torch.stack(rises).softmax(0)
            torch.testing.assert_close(adaptation.measured["attention"][layer].double(), weights[layer])
        for parameter in model.parameters():
            parameter.add_(0.1)
        expected = 0.0
        for layer, ours, theirs in (
            ("stem", model.stem(x), source.stem(x)),
            ("block", model.block(model.stem(x)), source.block(source.stem(x))),
        ):
            for channel in range(5):
                squares = (ours[..., channel] - theirs[..., channel]).square().sum()
                expected += 0.7 / 2 * weights[layer][channel] * squares / (4 * 8 * 8)
    outputs = model(x)
    found = adaptation.loss(0 * outputs.sum(), outputs, x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_ldifs_divides_by_the_length_over_channels():
    adaptation, source = adapted(ctl.FeatureConservation(alpha=1.0, metric="ldifs", layers=("stem",)))
    model, x = adaptation.model.eval(), X.double()
    with torch.no_grad():
        model.stem[0].weight.add_(0.1)
    ours, theirs = (one.stem(x).flatten(0, 2) for one in (model, source))
    expected = torch.stack(
        [(a / a.norm() - b / b.norm()).square().sum() for a, b in zip(ours, theirs, strict=True)]
    ).mean()
    outputs = model(x)
    torch.testing.assert_close(adaptation.loss(0 * outputs.sum(), outputs, x), expected)


def test_a_head_fed_from_layers_and_features_for_advice():
    """Means over positions, not over channels."""
    adaptation, source = adapted(ctl.FeatureExtraction(layers=("stem", "block")))
    assert adaptation.model.head.weight.shape == (3, 10)
    x = X.double()
    found = features_of(source, (x, Y), find_layers(source, x, ["stem", "block", "head"])).layers
    expected = source.stem(x).mean((1, 2))
    torch.testing.assert_close(found["stem"].double(), expected, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        scores = F.linear(torch.cat([expected, source.block(source.stem(x)).mean((1, 2))], 1),
                          adaptation.model.head.weight, adaptation.model.head.bias)  # fmt: skip
    torch.testing.assert_close(adaptation.model.eval()(x), scores)


def test_amplitudes_scale_channels():
    adaptation, source = adapted(ctl.LHUC(on=("stem",)))
    x = X.double()
    (name,) = (name for name in adaptation.plan.trained)
    assert name == "stem.2.lhuc"
    factor = torch.tensor([0.5, 1.0, 1.5, 0.2, 1.8], dtype=torch.float64)
    with torch.no_grad():
        adaptation.model.stem[2].lhuc.copy_(torch.logit(factor / 2))
    torch.testing.assert_close(adaptation.model.stem(x), source.stem(x) * factor)


@pytest.mark.parametrize(
    ("module", "shape", "axis"),
    [
        (nn.Conv2d(3, 8, 3), (2, 5, 6, 7), 1),
        (nn.Conv2d(3, 8, 3), (2, 5, 6), 2),
        (nn.Linear(3, 8), (2, 5, 6), 2),
        (nn.ReLU(), (2, 5, 6, 7), 3),
    ],
)
def test_no_axis_has_a_declared_size(module, shape, axis):
    """Rule 3: second behind a convolution of as many dimensions, and last otherwise."""
    assert Channels(module).axis(torch.zeros(shape)) == axis
