"""Updates act by their precedence, whatever their place in the plan."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import permutations
from typing import Literal

import pytest
import torch
from torch import nn

import conservtl as ctl
from conservtl.methods import apply_all
from conservtl.plan.update import Update
from conservtl.runtime.inner_optimizer import check_moves
from conservtl.runtime.runners import UpdateRunner
from conservtl.testing.choices import whole_plan

STRATEGIES = [ctl.L1SP(), ctl.SelectiveDecay(), ctl.Mixout(), ctl.AutoRGN(), ctl.GroupLassoSP(), ctl.Projection()]
ORDER = ["auto_rgn", "mixout", "proximal:group_lasso", "proximal:l1", "projection", "selective_decay"]


@pytest.fixture(scope="module")
def updates():
    return apply_all(whole_plan(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))), STRATEGIES).updates


def test_the_order_is_that_of_the_precedence(updates):
    """AutoRGN first: the others see the rate it sets. Mixout next: the others see plain weights."""
    for some in permutations(updates):
        assert [update.name for update in UpdateRunner(some).updates] == ORDER


def test_after_the_step_they_act_in_reverse(updates, monkeypatch):
    """As contexts nest: what acted first before it acts last after it."""
    acted = []
    for cls in {type(update) for update in updates}:
        if "after" in vars(cls):
            monkeypatch.setattr(cls, "after", lambda update, step, state: acted.append(update.name))
    UpdateRunner(updates).act("after", lambda update: [])
    assert acted == [name for name in reversed(ORDER) if name != "mixout"]


def test_what_the_built_in_updates_need(updates):
    """Shards: whether they act on sharded parameters. Anchors: whether they need starting values in memory.

    Their precedence is documented, so that updates of one's own can act between two of them.
    """
    flags = ("precedence", "shards", "anchors", "layered", "forward")
    assert {update.name: [getattr(type(update), flag) for flag in flags] for update in updates} == {
        "auto_rgn": [-20, True, False, True, False],
        "mixout": [-10, False, True, False, True],
        "proximal:group_lasso": [10, True, True, False, False],
        "proximal:l1": [10, True, True, False, False],
        "projection": [20, True, True, False, False],
        "selective_decay": [30, True, True, False, False],
    }


class Averaging(torch.optim.SGD):
    """A schedule-free optimizer keeps averaged weights beside the model's."""

    def train(self):
        """Nothing is averaged here."""

    eval = train


class Clipping(Update):
    """Acts on gradients alone."""

    kind: Literal["runner_clipping"] = "runner_clipping"

    def describe(self):
        return "clips"

    def gradients(self, step, state):
        """Do nothing."""


@pytest.mark.parametrize(
    ("strategy", "moves"),
    [
        (ctl.L2SP(), False),
        (ctl.L2SP(mode="decoupled"), True),
        (ctl.AutoRGN(), False),  # it sets rates
        (ctl.Mixout(), True),
        (ctl.L1SP(), True),
        (None, False),
    ],
    ids=str,
)
def test_weights_that_an_optimizer_averages_are_moved_by_it_alone(strategy, moves):
    plan = apply_all(whole_plan(nn.Linear(3, 4)), [] if strategy is None else [strategy])
    plan = plan if strategy is not None else plan.with_update(Clipping(by="Clipping", names=("weight",)))
    refused = pytest.raises(ctl.SpecError, match=r"keeps averaged weights .* which \w+ moves without them")
    with refused if moves else nullcontext():
        check_moves(Averaging([nn.Parameter(torch.zeros(1))], lr=0.1), plan, "Averaging")
    check_moves(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1), plan, "SGD")
