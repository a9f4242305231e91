"""Adaptations that are deleted leave no hook and no memory behind; long loops neither."""

from __future__ import annotations

from pathlib import Path

import pytest
import soak
import torch

import conservtl as ctl
from conservtl.methods import builtin_strategies


@pytest.mark.parametrize("name", soak.STRATEGIES)
def test_deleted_adaptations_leave_nothing(name):
    """Ten adaptations; a leak would be an object of each at least."""
    grown = soak.after_adaptations(soak.STRATEGIES[name], 10)
    assert grown["hooks"] == 0
    assert grown["objects"] < 10


def test_every_strategy_has_a_long_run():
    assert {type(one) for one in soak.STRATEGIES.values()} == set(builtin_strategies().values())


@pytest.mark.parametrize("strategy", [ctl.FeatureConservation(), ctl.Mixout(), ctl.WeightInterpolation(t=0.5)])
def test_the_hooks_go_with_the_adaptation(strategy):
    """Those that only an adaptation needs; the model computes what it did."""
    model = soak.network()
    before = model.eval()(soak.INPUTS)
    adaptation = ctl.adapt(model, soak.network(), [strategy], example=soak.INPUTS)
    assert soak.hooks_of(model) > 0
    del adaptation
    assert soak.hooks_of(model) == 0
    assert torch.equal(model.eval()(soak.INPUTS), before)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
@pytest.mark.parametrize("name", ["FeatureConservation", "L2SP", "Mixout", "SpectralShrinkage"])
def test_memory_is_flat_over_steps(name):
    """A leak of a tensor a step would be hundreds of objects and megabytes."""
    grown = soak.after_steps(soak.STRATEGIES[name], 300)
    assert grown["memory_kib"] < 4096
    assert grown["files"] == 0
