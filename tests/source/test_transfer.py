"""Giving the model its starting point: copies, and what is fresh as handed in or initialised anew."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import conservtl as ctl
from conservtl.testing.weights import random_weights


def network(classes=2):
    return nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False), nn.Linear(4, classes)
    )


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_fresh_is_what_the_layer_held():
    model = network()
    held = snapshot(model)
    source = random_weights(model, 1)
    ctl.adapt(model, source, [ctl.LayerTransfer(layers=1, rest="fresh")])
    state = model.state_dict()
    for name, tensor in state.items():
        assert torch.equal(tensor, source[name] if name[0] in "01" else held[name])


def test_statistics_follow_their_norm():
    """Those of a norm without parameters follow its layer."""
    model = network()
    source = random_weights(model, 1)
    ctl.adapt(model, source, fresh=["2"])
    assert torch.equal(model[1].running_mean, source["1.running_mean"])
    assert model[1].num_batches_tracked == source["1.num_batches_tracked"]
    assert not model[3].running_mean.any()


def test_fresh_is_initialised_anew_where_it_held_the_source():
    """With statistics: those of the source are no start for a layer with other weights."""
    model = network()
    model.load_state_dict(random_weights(model, 1))
    source = copy.deepcopy(model)
    held = snapshot(model)
    ctl.adapt(model, source, [ctl.LayerTransfer(layers=1, rest="fresh")])
    state = model.state_dict()
    for name in ("2.weight", "2.bias", "4.weight", "4.bias", "3.running_mean", "3.running_var"):
        assert not torch.equal(state[name], held[name])
    assert not state["3.running_mean"].any()
    for name in ("0.weight", "1.weight", "1.running_mean"):
        assert torch.equal(state[name], held[name])


def test_only_the_fresh_part_of_a_module_is_initialised():
    model = network()
    model.load_state_dict(random_weights(model, 1))
    held = snapshot(model)
    ctl.adapt(model, copy.deepcopy(model), fresh=["2.weight"])
    assert not torch.equal(model[2].weight, held["2.weight"])
    assert torch.equal(model[2].bias, held["2.bias"])


def test_statistics_of_its_own_stay_though_the_weights_are_those_of_any_new_norm():
    """A new norm holds ones, which a source may hold too."""
    model, source = network(), network()
    model[1].running_mean.fill_(3.0)
    ctl.adapt(model, source, fresh=["1.*"])
    assert torch.equal(model[1].running_mean, torch.full((4,), 3.0))
    assert torch.equal(model[1].weight, torch.ones(4))


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.MultiheadAttention(4, 2),
        lambda: nn.LSTM(3, 4),
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)),
        lambda: nn.PReLU(),
    ],
    ids=["attention", "lstm", "parametrized", "prelu"],
)
def test_modules_of_all_kinds_are_initialised(make):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), make())
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p))
    held = snapshot(model)
    ctl.adapt(model, copy.deepcopy(model), fresh=["1"])
    state = model.state_dict()
    for name in held:
        assert torch.equal(state[name], held[name]) is name.startswith("0"), name
        assert torch.isfinite(state[name]).all()


def test_parameters_that_no_module_initialises():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.token = nn.Parameter(torch.randn(1, 4))
            self.scale = nn.Parameter(torch.ones(4))
            self.head = nn.Linear(4, 2)

    model = Tokens()
    held = snapshot(model)
    ctl.adapt(model, copy.deepcopy(model), fresh=["token", "scale"])
    assert 0 < model.token.abs().max() < 0.1
    assert not model.scale.any()
    assert torch.equal(model.head.weight, held["head.weight"])


def test_types_and_devices_are_the_models():
    model = network()
    source = {k: v.half() if v.is_floating_point() else v for k, v in random_weights(model, 1).items()}
    ctl.adapt(model, source)
    assert model[0].weight.dtype is torch.float32
    assert torch.equal(model[0].weight, source["0.weight"].float())


def test_reasons():
    model = network(3)
    adaptation = ctl.adapt(model, random_weights(network(2), 1), fresh={"2.*": "other microphones"})
    assert adaptation.transfer.fresh == {
        "2.weight": "other microphones",
        "2.bias": "other microphones",
        "4.weight": "shape differs: (3, 4) here, (2, 4) in the source",
        "4.bias": "shape differs: (3,) here, (2,) in the source",
    }
    assert {row.name: row.reason for row in adaptation.plan.rows if row.reason} == adaptation.transfer.fresh
    assert "fresh  2.weight: other microphones" in str(adaptation.transfer)
    assert set(adaptation.transfer.unused) == {
        "2.weight", "2.bias", "4.weight", "4.bias", "3.running_mean", "3.running_var", "3.num_batches_tracked"
    }  # fmt: skip


def test_wrapped_models_are_filled_in_place():
    model = network()
    source = random_weights(model, 1)
    wrapped = nn.DataParallel(torch.compile(model, backend="eager"))
    adaptation = ctl.adapt(wrapped, source)
    assert adaptation.model is wrapped
    assert all(torch.equal(tensor, source[name]) for name, tensor in model.state_dict().items())
    assert set(adaptation.transfer.copied) == set(source)
