"""A head over the outputs of layers inside a model."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import conservtl as ctl
from conservtl.layers import find_layers
from conservtl.methods.feature_extraction.probe_head import add_probe_head, remove_probe_head


class HeadFirst(nn.Module):
    """Convolutions with the head registered first, so that only use tells the order."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.one = nn.Sequential(nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.ReLU(inplace=True))
        self.two = nn.Sequential(nn.Conv2d(5, 4, 3), nn.ReLU(inplace=True))

    def forward(self, x):
        return self.head(self.two(self.one(x)).mean((2, 3)))


class Frames(nn.Module):
    """A recurrent layer and a transformer block, whose channels come last."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(3, 4, batch_first=True, bidirectional=True)
        self.block = nn.TransformerEncoderLayer(8, 2, 6, 0.0, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.block(self.lstm(x)[0]).mean(1))


def extended(model, example, globs):
    torch.manual_seed(0)
    add_probe_head(model, find_layers(model, example), example, globs)
    return model


X = torch.randn(6, 2, 9, 9, generator=torch.Generator().manual_seed(0))
T = torch.randn(6, 7, 3, generator=torch.Generator().manual_seed(0))


def test_scores_are_those_of_the_layers_means_side_by_side():
    model = extended(HeadFirst().eval(), X, ["head", "one"])
    one = model.one(X)
    by_hand = torch.cat([one.mean((2, 3)), model.two(one).mean((2, 3))], 1)
    assert torch.allclose(model(X), by_hand @ model.head.weight.T + model.head.bias, atol=1e-6)
    assert model.head.weight.shape == (3, 9)


@pytest.mark.parametrize(("layer", "size"), [("lstm", 8), ("block", 8)])
def test_channels_that_come_last_are_kept_and_frames_averaged(layer, size):
    model = extended(Frames().eval(), T, [layer])
    frames = model.lstm(T)[0]
    features = (frames if layer == "lstm" else model.block(frames)).mean(1)
    assert torch.allclose(model(T), features @ model.head.weight.T + model.head.bias, atol=1e-6)
    assert model.head.weight.shape == (3, size)


def test_the_head_is_the_last_layer_still_and_what_feeds_it_is_its_own():
    """The order of use is seen on a copy without the user's hooks, which must keep these."""
    layers = find_layers(extended(HeadFirst(), X, ["one"]), X)
    assert [layer.name for layer in layers] == ["one", "two", "head"]


def test_copies_and_pickles_compute_from_their_own_layers():
    model = extended(HeadFirst().eval(), X, ["one"])
    expected = model(X).detach()
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    with torch.no_grad():
        model.one[0].weight.zero_()
    assert not torch.allclose(model(X), expected)
    for twin in twins:
        assert torch.equal(twin(X), expected)
        with torch.no_grad():
            twin.one[0].weight.zero_()
        assert torch.equal(twin(X), model(X))


def test_what_comes_next_may_write_into_a_layers_output():
    x = torch.randn(5, 3)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2))
    extended(model, x, ["0"])
    torch.testing.assert_close(model(x), model[0](x) @ model[2].weight.T + model[2].bias)


def test_gradients_reach_the_layers_and_nothing_is_held_afterwards():
    model = extended(HeadFirst(), X, ["one"])
    model(X).sum().backward()
    assert model.one[0].weight.grad is not None
    assert model.two[0].weight.grad is None
    assert not model.head.caught
    copy.deepcopy(model)


def test_a_convolutional_head_gives_as_many_dimensions_as_before():
    parts = (nn.Conv1d(2, 4, 3), nn.ReLU(), nn.Conv1d(4, 6, 3), nn.ReLU(), nn.Conv1d(6, 3, 1))
    model = nn.Sequential(*parts, nn.AdaptiveAvgPool1d(1), nn.Flatten())
    x = torch.randn(5, 2, 11)
    assert extended(model, x, ["0", "4"])(x).shape == (5, 3)
    assert model[4].weight.shape == (3, 4 + 6)


def test_it_is_taken_away_again():
    model = HeadFirst().eval()
    expected, head = model(X), model.head
    remove_probe_head(extended(model, X, ["one", "head"]))
    assert model.head is head
    assert torch.equal(model(X), expected)
    assert not any(module._forward_hooks for module in model.modules())


class TestRefused:
    def test_without_an_example(self):
        with pytest.raises(ctl.SpecError, match="Pass adapt"):
            extended(HeadFirst(), None, ["one"])

    def test_a_layer_that_there_is_not(self):
        with pytest.raises(ctl.SelectorError, match="'three'"):
            extended(HeadFirst(), X, ["three"])

    def test_twice(self):
        with pytest.raises(ctl.SpecError, match="already"):
            extended(extended(HeadFirst(), X, ["one"]), X, ["one"])

    def test_a_head_that_is_the_whole_model(self):
        with pytest.raises(ctl.SpecError, match="the whole model"):
            extended(nn.Linear(2, 3), X[:, :, 0, 0], ["*"])

    def test_a_head_for_each_frame(self):
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        with pytest.raises(ctl.SpecError, match="its head gets none"):
            extended(model, T, ["0"])

    def test_an_example_that_does_not_fit(self):
        model = HeadFirst()
        with pytest.raises(ctl.SpecError, match="cannot be called with it"):
            add_probe_head(model, find_layers(model, X), X[:, :1], ["one"])
        assert type(model.head) is nn.Linear
