"""Freezing: no gradients and no change of statistics, through every train()."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from conservtl.runtime.freezing import found_frozen, freeze, hold_statistics, holds, let_train, tracks_statistics


def test_which_modules_track():
    assert tracks_statistics(nn.BatchNorm2d(2))
    assert tracks_statistics(nn.SyncBatchNorm(2))
    assert tracks_statistics(nn.InstanceNorm1d(2, track_running_stats=True))
    assert not tracks_statistics(nn.InstanceNorm1d(2))
    assert not tracks_statistics(nn.BatchNorm2d(2, track_running_stats=False))
    assert not tracks_statistics(nn.LayerNorm(2))


def test_freeze():
    model = nn.ParameterDict({name: nn.Parameter(torch.ones(2)) for name in "abc"})
    a, b, c = model.values()
    for p in (a, b, c):
        p.grad = torch.ones(2)
    assert not freeze(model, {"a", "b"}, keep=["b"])
    assert (a.requires_grad, b.requires_grad, c.requires_grad) == (False, True, True)
    assert a.grad is None
    assert b.grad is None
    assert c.grad is not None
    assert freeze(model, set())
    assert a.requires_grad
    assert not freeze(model, set())


@pytest.mark.parametrize("how", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_what_is_frozen_elsewhere_stays_frozen(how):
    """``freeze`` trains again what it froze itself, in a copy of the model too."""
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1), nn.Linear(1, 1))
    model[0].requires_grad_(False)
    assert found_frozen(model) == {"0.weight", "0.bias"}
    freeze(model, {"0.weight", "0.bias", "1.weight", "1.bias"})
    model = how(model)
    assert found_frozen(model) == {"0.weight", "0.bias"}
    freeze(model, ())
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, True, True, True]
    let_train(model, ["0.bias", "1.bias"])
    freeze(model, ())
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True, True, True]
    freeze(model, ["1.bias"])
    model.requires_grad_(False)
    assert found_frozen(model) == {f"{i}.{name}" for i in range(3) for name in ("weight", "bias")}


@pytest.mark.parametrize("how", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_held_through_train_copies_and_pickles(how):
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2)).train()
    hold_statistics(model, [model[0]], training=True)
    model = how(model)
    for mode in (True, False, True):
        assert model.train(mode) is model
        assert [norm.training for norm in model] == [False, mode]
    original = model[0].running_mean.clone()
    model(torch.randn(4, 2) + 5)
    assert torch.equal(model[0].running_mean, original)
    hold_statistics(model, [], training=model.training)
    assert model[0].training
    assert not model.eval()[0].training
    assert model.train()[0].training
    assert "train" not in vars(model[0])


def test_a_norm_never_held_is_left_in_its_mode():
    model = nn.Sequential(nn.BatchNorm1d(2)).train()
    model[0].eval()
    hold_statistics(model, [], training=True)
    assert not model[0].training


@pytest.mark.parametrize(
    ("statistics", "frozen", "held"),
    [
        ([], "ab", False),
        (["follow", "follow"], "ab", True),
        (["follow", "follow"], "a", False),
        (["follow", "hold"], "", True),
        (["follow", "follow"], "", False),
    ],
)
def test_a_norm_is_held_if_all_its_rows_are_frozen_or_one_is_to_be(statistics, frozen, held):
    rows = [SimpleNamespace(name=name, statistics=one) for name, one in zip("ab", statistics, strict=False)]
    assert holds(rows, frozen) == held
