"""Groups: real rates, by name, each trained parameter once."""

from __future__ import annotations

import functools

import torch
from torch import nn

import conservtl as ctl
from conservtl.testing.weights import random_weights


def adapted(*strategies, fresh=()):
    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 2))
    return ctl.adapt(model, random_weights(model, 0), strategies, fresh=fresh)


def groups(optimizer):
    return {tuple(g["param_names"]): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups}


def test_one_group_where_nothing_differs():
    optimizer = adapted().optimizer(torch.optim.AdamW, lr=0.1)
    assert groups(optimizer) == {("0.weight", "0.bias", "1.weight", "1.bias", "2.weight", "2.bias"): (0.1, 0.01)}


def test_by_rate_and_by_weight_decay():
    optimizer = adapted(ctl.DiscriminativeLR(groups={"2": 0.5}), ctl.L2SP()).optimizer(torch.optim.AdamW, lr=0.1)
    assert groups(optimizer) == {
        ("0.weight",): (0.1, 0.0),
        ("0.bias", "1.weight", "1.bias"): (0.1, 0.01),
        ("2.weight",): (0.05, 0.0),
        ("2.bias",): (0.05, 0.01),
    }


def test_beta_covers_what_is_fresh():
    optimizer = adapted(ctl.L2SP(on="all"), fresh=["2"]).optimizer(torch.optim.AdamW, lr=0.1)
    assert {decay for _, decay in groups(optimizer).values()} == {0.0}


def test_frozen_layers_are_in_no_group_and_do_not_shift_the_rates_of_others():
    """Depth is counted over all layers."""
    free = adapted(ctl.DiscriminativeLR(decay=0.5)).optimizer(torch.optim.SGD, lr=0.1)
    held = adapted(ctl.DiscriminativeLR(decay=0.5), ctl.LayerTransfer(layers=1)).optimizer(torch.optim.SGD, lr=0.1)
    rates = [{name: g["lr"] for g in o.param_groups for name in g["param_names"]} for o in (free, held)]
    assert rates[1] == {name: lr for name, lr in rates[0].items() if name.startswith("2")}


def test_the_optimizers_own_default_rate():
    assert {lr for lr, _ in groups(adapted().optimizer(torch.optim.AdamW)).values()} == {1e-3}
    made = adapted().optimizer(functools.partial(torch.optim.AdamW, lr=0.3))
    assert {lr for lr, _ in groups(made).values()} == {0.3}


def test_an_optimizer_without_weight_decay():
    optimizer = adapted(ctl.L2SP()).optimizer(torch.optim.Rprop, lr=0.1)
    assert "weight_decay" not in optimizer.param_groups[0]


def test_a_phase_that_comes_later_is_in_the_groups_already():
    """Freezing never touches the list of groups."""
    adaptation = adapted(ctl.GradualUnfreezing(scales=(0.5, 1.0)))
    optimizer = adaptation.optimizer(torch.optim.SGD, lr=0.1)
    assert sum(len(g["params"]) for g in optimizer.param_groups) == 6
    assert {g["lr"] for g in optimizer.param_groups} == {0.05}
    members = [id(p) for g in optimizer.param_groups for p in g["params"]]
    adaptation.start_phase(1)
    assert members == [id(p) for g in optimizer.param_groups for p in g["params"]]
    assert {g["lr"] for g in optimizer.param_groups} == {0.1}
