"""An affine transform of the input: the identity at the start, in the first weights at the end."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import conservtl as ctl
from conservtl.layers import find_layers
from conservtl.testing.weights import random_weights

X = torch.randn(6, 2, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.arange(6) % 3


class Network(nn.Module):
    """A convolution of the input, the classifier registered first."""

    def __init__(self, padding=1, bias=True, mode="zeros", skip=False):
        super().__init__()
        self.head = nn.Linear(2, 3)
        self.conv = nn.Conv2d(2, 2, 3, padding=padding, bias=bias, padding_mode=mode)
        self.skip = skip

    def forward(self, x, scale=1.0):
        h = self.conv(x) + (x if self.skip else 0)
        return self.head((scale * h).relu().mean((2, 3)))


def network(**options):
    torch.manual_seed(0)
    return Network(**options).double()


def adapted(*others, model=None, example=X, **fields):
    model = network() if model is None else model
    return ctl.adapt(model, random_weights(model, 1), [ctl.InputTransform(**fields), *others], example=example)


def disturbed(adaptation):
    with torch.no_grad():
        for parameter in adaptation.model.input_transform.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    return adaptation.model.eval()


def transformed(x, weight, bias):
    return torch.einsum("ij,njhw->nihw", torch.eye(2, dtype=x.dtype) + weight, x) + bias.view(-1, 1, 1)


def test_outputs_and_gradients_are_those_of_an_affine_map_of_the_features():
    model = disturbed(adapted())
    plain = network().eval()
    plain.load_state_dict({name: t for name, t in model.state_dict().items() if "input" not in name})
    weight, bias = (p.detach().clone().requires_grad_() for p in model.input_transform.parameters())
    expected = plain(transformed(X, weight, bias))
    assert torch.allclose(model(X), expected, rtol=1e-10)
    nn.functional.cross_entropy(expected, Y).backward()
    nn.functional.cross_entropy(model(X), Y).backward()
    assert torch.allclose(model.input_transform.weight.grad, weight.grad, rtol=1e-9)
    assert torch.allclose(model.input_transform.bias.grad, bias.grad, rtol=1e-9)
    assert weight.grad.abs().min() > 0
    assert model.conv.weight.grad is None


@torch.no_grad()
def test_computes_at_the_start_bit_for_bit_what_the_source_did():
    source = network()
    source.load_state_dict(random_weights(source, 1))
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        assert torch.equal(adapted().model.to(dtype)(X.to(dtype)), source.to(dtype)(X.to(dtype)))


@torch.no_grad()
@pytest.mark.parametrize(
    ("options", "bias"),
    [
        ({}, False),
        ({"bias": False}, False),
        ({"padding": 0}, True),
        ({"padding": 1, "mode": "replicate"}, True),
    ],
)
def test_merged_is_a_plain_model_that_computes_the_same(options, bias):
    adaptation = adapted(model=network(**options), bias=bias)
    expected = disturbed(adaptation)(X)
    merged = adaptation.merged()
    plain = network(**options).eval()
    plain.load_state_dict(merged.state_dict())
    assert torch.allclose(plain(X), expected, rtol=1e-12)
    assert torch.equal(merged(X), plain(X))
    assert not merged._forward_pre_hooks


@torch.no_grad()
@pytest.mark.parametrize(
    ("options", "example"),
    [
        ({"padding": 1}, X),  # zeros at the border are not zeros of the transformed input
        ({"padding": "same"}, X),
        ({"padding": 0, "bias": False}, X),  # nothing to add to
        ({"skip": True}, X),  # somebody else takes the input too
        ({"padding": 0}, None),  # nobody knows who takes it
    ],
)
def test_what_cannot_be_merged_exactly_stays(options, example):
    model = network(**options)
    adaptation = adapted(model=model, example=example)
    expected = disturbed(adaptation)(X)
    merged = adaptation.merged()
    assert torch.equal(merged(X), expected)
    assert "input_transform.weight" in merged.state_dict()
    assert not ctl.InputTransform().merge(merged)


@torch.no_grad()
def test_an_example_of_zeros_does_not_hide_who_else_takes_the_input():
    model = disturbed(adapted(model=network(skip=True), example=torch.zeros_like(X), bias=False))
    assert not ctl.InputTransform().merge(copy.deepcopy(model))


@torch.no_grad()
def test_inputs_are_not_merged_through_what_is_not_linear():
    class Logarithm(nn.Module):
        def __init__(self):
            super().__init__()
            self.map = nn.Linear(4, 4)

        def forward(self, x):
            return self.map(x.square())

    model = Logarithm()
    adaptation = ctl.adapt(model, random_weights(model, 0), [ctl.InputTransform()], example=torch.randn(3, 4))
    x, expected = torch.randn(3, 4), None
    expected = disturbed(adaptation)(x)
    assert torch.equal(adaptation.merged()(x), expected)


@torch.no_grad()
@pytest.mark.parametrize("shape", [(6, 4), (6, 5, 4)])
def test_features_on_the_last_axis(shape):
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    x = torch.randn(shape, dtype=torch.float64)
    strategy = ctl.InputTransform(dim=-1)
    adaptation = ctl.adapt(model, random_weights(model, 1), [strategy], example=x)
    assert adaptation.plan["input_transform.weight"].shape == (4, 4)
    model = disturbed(adaptation)
    expected = model[3](model[2](model[1](x + x @ model[0].weight.T + model[0].bias)))
    assert torch.allclose(model(x), expected, rtol=1e-10)
    merged = adaptation.merged()
    assert list(merged.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert torch.allclose(merged(x), expected, rtol=1e-10)


@torch.no_grad()
def test_inputs_by_keyword_and_arguments_beside_them():
    model = disturbed(adapted())
    assert torch.equal(model(x=X, scale=2.0), model(X, 2.0))
    assert not torch.equal(model(X, 2.0), model(X))
    with pytest.raises(ctl.SpecError, match="called without a tensor"):
        model([X])


class TestLayers:
    def test_it_is_the_layer_at_the_input_side_and_the_head_stays_the_head(self):
        adaptation = adapted()
        assert adaptation.plan.layers == ("input_transform", "conv", "head")
        assert adaptation.plan.own_layers == ("conv", "head")
        assert set(adaptation.plan.head) == {"head.weight", "head.bias"}
        assert set(adaptation.plan.trained) == {"input_transform.weight", "input_transform.bias"}
        assert next(iter(dict(adaptation.model.named_children()))) == "input_transform"

    def test_without_an_example_it_is_registered_first(self):
        model = nn.Sequential(nn.BatchNorm2d(2), nn.Conv2d(2, 3, 1), nn.Flatten(), nn.Linear(105, 2))
        plan = ctl.adapt(model, random_weights(model, 0), [ctl.InputTransform()], layers=None).plan
        assert plan.layers == ("input_transform", "1", "3")
        assert [row.name for row in plan.rows if row.layer == "1"] == ["0.weight", "0.bias", "1.weight", "1.bias"]

    def test_a_cut_into_layers_of_ones_own_need_not_name_it(self):
        model = network()
        adaptation = ctl.adapt(model, random_weights(model, 1), [ctl.InputTransform()], layers=["conv", "head"])
        assert adaptation.plan.layers == ("input_transform", "conv", "head")

    def test_the_length_is_read_from_the_first_weights_or_asked_for(self):
        model = nn.Sequential(nn.LSTM(5, 3))
        assert ctl.adapt(model, random_weights(model, 0), [ctl.InputTransform(dim=-1)]).plan.rows[0].shape == (5, 5)
        model = nn.Sequential(nn.LSTM(5, 3))
        with pytest.raises(ctl.SpecError, match=r"axis 1 cannot be told from layer '0'\. Pass adapt"):
            ctl.adapt(model, random_weights(model, 0), [ctl.InputTransform()])
        assert list(dict(model.named_children())) == ["0"]

    def test_inputs_that_are_no_features_are_refused(self):
        model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2))
        with pytest.raises(ctl.SpecError, match=r"dim=1 must be an axis behind the batch .* torch.int64"):
            ctl.adapt(model, random_weights(model, 0), [ctl.InputTransform()], example=torch.tensor([[1, 2]]))
        with pytest.raises(ctl.SpecError, match="dim=-4 must be an axis"):
            adapted(dim=-4)
        with pytest.raises(ValueError, match="dim=0 is the batch"):
            ctl.InputTransform(dim=0)

    def test_a_model_of_one_module_is_refused(self):
        model = nn.Linear(3, 2)
        with pytest.raises(ctl.SpecError, match=r"nothing to put in front of\. Wrap it: nn\.Sequential"):
            ctl.adapt(model, random_weights(model, 0), [ctl.InputTransform()])


@pytest.mark.parametrize("sequential", [False, True])
def test_copies_transform_once_and_by_their_own_weights(sequential):
    model = network()
    model = nn.Sequential(model.conv, nn.ReLU(), nn.Flatten(), nn.Linear(70, 3)).double() if sequential else model
    model = disturbed(adapted(model=model))
    expected = model(X)
    twins = [copy.deepcopy(model), copy.deepcopy(copy.deepcopy(model)), pickle.loads(pickle.dumps(model))]
    with torch.no_grad():
        model.input_transform.weight.zero_()
    for twin in twins:
        assert torch.equal(twin(X), expected)
        ctl.InputTransform().retract(twin)
        assert torch.allclose(twin(transformed(X, torch.zeros(2, 2), model.input_transform.bias)), model(X))
        assert next(iter(twin.state_dict())) in ("0.weight", "head.weight")


def test_state_dict_there_and_back():
    first, second = adapted(), adapted()
    disturbed(first)
    second.model.load_state_dict(first.model.state_dict())
    assert torch.equal(second.model.eval()(X), first.model(X))


def test_refused_twice_and_the_first_stays():
    model = network()
    weights = random_weights(model, 1)
    ctl.adapt(model, weights, [ctl.InputTransform()])
    with pytest.raises(ctl.SpecError, match="has an input transform already"):
        ctl.adapt(model, weights, [ctl.InputTransform()])
    assert "input_transform.weight" in model.state_dict()


class TestTogether:
    def test_plain_l2_pulls_to_the_identity(self):
        adaptation = adapted(ctl.L2SP(beta=0.5))
        disturbed(adaptation)
        before = adaptation.model.input_transform.weight.detach().clone()
        optimizer = adaptation.optimizer(torch.optim.SGD, lr=0.1)
        adaptation.model(X).sum().mul(0).backward()
        optimizer.step()
        assert torch.allclose(adaptation.model.input_transform.weight, before * (1 - 0.1 * 0.5))

    def test_layer_transfer_counts_the_models_own_layers(self):
        plan = adapted(ctl.LayerTransfer(layers=1), freeze=False).plan
        assert {row.name for row in plan.rows if row.frozen} == {"conv.weight", "conv.bias"}

    def test_rates_and_phases(self):
        plan = adapted(ctl.DiscriminativeLR(decay=0.5, toward="input"), freeze=False).plan
        assert (plan["input_transform.weight"].scale, plan["head.weight"].scale) == (1.0, 0.25)
        assert len(adapted(ctl.GradualUnfreezing(by="layer", at="input"), freeze=False).plan.phases) == 3

    def test_features_are_compared_with_those_of_a_source_that_has_no_transform(self):
        adaptation = adapted(ctl.FeatureConservation(layers=1))
        assert adaptation.plan.terms[0].taps == ("conv",)
        disturbed(adaptation)
        outputs = adaptation.model(X)
        assert adaptation.loss(outputs.mean(), outputs, X) > outputs.mean()

    @torch.no_grad()
    def test_amplitudes_too_and_both_are_merged(self):
        adaptation = adapted(ctl.LHUC(), bias=False)
        assert set(adaptation.plan.trained) == {"input_transform.weight", "conv.lhuc"}
        expected = disturbed(adaptation)
        expected.conv.lhuc.normal_()
        merged = adaptation.merged()
        assert list(merged.state_dict()) == list(network().state_dict())
        assert torch.allclose(merged(X), expected(X), rtol=1e-12)

    def test_one_that_refuses_takes_the_other_with_it(self):
        model = network()
        with pytest.raises(ctl.SelectorError):
            ctl.adapt(model, random_weights(model, 1), [ctl.InputTransform(), ctl.LHUC(on=["none"])], example=X)
        assert list(model.state_dict()) == list(network().state_dict())
        assert not model._forward_pre_hooks


def test_wrapped_models_are_extended_and_merged_inside():
    model = network(padding=0)
    adaptation = ctl.adapt(nn.DataParallel(model), random_weights(model, 1), [ctl.InputTransform()], example=X)
    assert find_layers(model, X)[0].name == "input_transform"
    assert list(adaptation.merged().state_dict()) == list(network().state_dict())
