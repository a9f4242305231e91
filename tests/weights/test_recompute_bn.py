"""Running statistics computed anew: the plain average over the batches, whatever was there before."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import conservtl as ctl
from conservtl.runtime.freezing import hold_statistics


def network(**options):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.BatchNorm1d(5, **options), nn.ReLU(), nn.Linear(5, 2))


def batches(count=3):
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 4, generator=generator), torch.zeros(8, dtype=torch.long)) for _ in range(count)]


@pytest.mark.parametrize("momentum", [0.1, 0.9, None])
def test_they_are_the_average_over_the_batches(momentum):
    """Of what passes the norm with nothing dropped out; the old value and the momentum leave no trace."""
    model = network(momentum=momentum)
    model[2].running_mean.fill_(float("inf"))
    ctl.recompute_statistics(model, batches())
    passed = [model[0](inputs).detach() for inputs, _ in batches()]
    assert torch.allclose(model[2].running_mean, torch.stack([x.mean(0) for x in passed]).mean(0), atol=1e-6)
    assert torch.allclose(model[2].running_var, torch.stack([x.var(0) for x in passed]).mean(0), atol=1e-6)


def test_all_else_is_as_it_was():
    """Modes, momentum, the count of batches, weights, hooks."""
    model = network(momentum=0.3)
    model.train()
    model[2].eval()
    model[2].num_batches_tracked.fill_(17)
    before = copy.deepcopy({n: t for n, t in model.state_dict().items() if "running" not in n})
    ctl.recompute_statistics(model, batches())
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert [module.training for module in model.modules()] == [True, True, True, False, True, True]
    assert model[2].momentum == 0.3
    assert not model[2]._forward_pre_hooks


def test_a_frozen_norm_is_computed_and_stays_frozen():
    """What keeps it in eval mode through every train() must not keep its statistics."""
    model = network()
    hold_statistics([model[2]], [model[2]], training=True)
    model.train()
    free = network()
    ctl.recompute_statistics(model, batches())
    ctl.recompute_statistics(free, batches())
    assert torch.equal(model[2].running_var, free[2].running_var)
    assert not model.train()[2].training


def test_a_norm_that_is_used_twice_counts_each_use():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def forward(self, inputs):
            return self.norm(inputs) + self.norm(inputs + 1)

    model = Shared()
    ctl.recompute_statistics(model, batches())
    means = torch.stack([inputs.mean(0) + shift for inputs, _ in batches() for shift in (0, 1)])
    assert torch.allclose(model.norm.running_mean, means.mean(0), atol=1e-6)


def test_a_norm_that_is_not_used_keeps_what_it_has():
    model = nn.ModuleList([nn.BatchNorm1d(4), nn.BatchNorm1d(4)])
    model[1].running_mean.fill_(3)
    ctl.recompute_statistics(model, batches(), forward=lambda model, batch: model[0](batch[0]))
    assert torch.equal(model[1].running_mean, torch.full((4,), 3.0))
    assert not torch.equal(model[0].running_mean, torch.zeros(4))


def test_instance_norms_that_track_statistics_too():
    """Torch has no cumulative average for them."""
    model = nn.Sequential(nn.InstanceNorm1d(3, track_running_stats=True))
    data = [(torch.randn(4, 3, 9), None) for _ in range(3)]
    ctl.recompute_statistics(model, data)
    expected = torch.stack([inputs.mean((0, 2)) for inputs, _ in data]).mean(0)
    assert torch.allclose(model[0].running_mean, expected, atol=1e-6)


def test_nothing_to_compute_and_nothing_to_compute_on():
    ctl.recompute_statistics(nn.Linear(2, 2), [])
    model = network()
    with pytest.raises(ctl.DataError, match="no batches"):
        ctl.recompute_statistics(model, [])
    assert torch.equal(model[2].running_var, torch.ones(5))
