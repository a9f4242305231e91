"""Rates of groups that a phase scales and a scheduler sets, at the borders of the warnings."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

import conservtl as ctl
from conservtl.runtime.rates_over_time import PhaseRates


def optimizer(*rates):
    return torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates])


def give(made, *rates):
    for group, rate in zip(made.param_groups, rates, strict=True):
        group["lr"] = rate


def rates(made, field="lr"):
    return [group[field] for group in made.param_groups]


def equal():
    return pytest.warns(ctl.OmissionWarning, match=r"rates of all groups equal \(0\.25\)")


@pytest.mark.parametrize(
    ("made", "given", "warns"),
    [
        ((0.5, 0.125), [(0.5, 0.125), (0.25, 0.25)], True),
        ((0.5, 0.125), [(0.25, 0.125), (0.25, 0.25)], False),  # they had changed before
        ((0.5, 0.125), [(0.0, 0.0)], False),  # the end of a schedule
        ((0.5, 0.5), [(0.25, 0.25)], False),
        ((0.5,), [(0.25,)], False),
    ],
)
def test_rates_that_become_equal_at_their_first_change(made, given, warns):
    one = optimizer(*made)
    watch = PhaseRates(one)
    for number, some in enumerate(given):
        give(one, *some)
        with equal() if warns and number + 1 == len(given) else nullcontext():
            watch.check()
    watch.check()


def test_a_scale_replaces_the_one_before():
    one = optimizer(0.5, 0.125)
    watch = PhaseRates(one)
    watch.scale(0.5)  # a group that records none has this one
    assert (rates(one), rates(one, "initial_lr"), rates(one, "phase_scale")) == ([0.5, 0.125], [0.5, 0.125], [0.5] * 2)
    give(one, 0.25, 0.0625)  # by a scheduler
    watch.scale(2.0)
    assert (rates(one), rates(one, "initial_lr"), rates(one, "phase_scale")) == ([1.0, 0.25], [2.0, 0.5], [2.0] * 2)


@pytest.mark.parametrize(
    ("scale", "given", "warns"),
    [
        (0.5, (0.5, 0.25), True),  # back up, as before the phase
        (0.5, (0.125, 0.0625), False),
        (0.5, (0.25, 0.0625), False),  # one stays, one falls
        (2.0, (0.5, 0.25), True),  # back down
        (2.0, (2.0, 1.0), False),
        (1.0, (2.0, 1.0), False),  # the phase changed nothing
    ],
)
@pytest.mark.parametrize("scheduled", [True, False])
def test_rates_of_an_earlier_phase(scale, given, warns, scheduled):
    one = optimizer(0.5, 0.25)
    for group in one.param_groups:
        group["phase_scale"] = 1.0
    if scheduled:
        LambdaLR(one, lambda _: 1.0)
    watch = PhaseRates(one)
    watch.scale(scale)
    watch.check()  # rates of the phase: nothing has changed yet
    give(one, *given)
    back = pytest.warns(ctl.OmissionWarning, match="sets the rates of the earlier phase again")
    with back if warns and scheduled else nullcontext():
        watch.check()
    give(one, 0.75, 0.5)
    watch.check()  # once


def test_a_scheduler_that_is_made_in_the_phase_knows_its_rates():
    one = optimizer(0.5, 0.25)
    for group in one.param_groups:
        group["phase_scale"] = 1.0
    LambdaLR(one, lambda _: 1.0)
    watch = PhaseRates(one)
    watch.scale(0.5)
    LambdaLR(one, lambda _: 1.0)
    give(one, 0.5, 0.25)
    watch.check()


def test_warnings_name_the_line_that_makes_the_step():
    """And not one of this library or of torch, in whose hooks they are given."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    strategies = [ctl.L2SP(), ctl.DiscriminativeLR(decay=0.5), ctl.GradualUnfreezing(scales=(1.0, 0.5))]
    adaptation = ctl.adapt(model, copy.deepcopy(model), strategies)
    ours, other = adaptation.optimizer(torch.optim.SGD, lr=0.1), torch.optim.SGD(model.parameters(), lr=0.1)
    other.step()
    other.step()
    with pytest.warns(ctl.OmissionWarning, match="has trained the adapted model for 3 steps") as foreign:
        other.step()
    given = rates(ours)
    LambdaLR(ours, lambda _: 1.0)
    adaptation.start_phase(1)
    give(ours, *given)
    with pytest.warns(ctl.OmissionWarning, match="of the earlier phase again") as back:
        ours.step()
    other = adaptation.optimizer(torch.optim.SGD, lr=0.1)
    give(other, *[0.25] * len(given))
    with equal() as same:
        other.step()
    assert [one[0].filename for one in (foreign, back, same)] == [__file__] * 3
    adaptation.finish()
