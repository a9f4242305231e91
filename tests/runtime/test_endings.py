"""Endings that are due, by the steps, phases and saves that came before."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
from torch import nn

import conservtl as ctl
from conservtl.runtime.omissions import Endings


def endings(*strategies):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    found = Endings()
    found.bind(ctl.adapt(model, copy.deepcopy(model), strategies).plan)
    return found


def due(message="WeightInterpolation was not carried out: call adaptation.finish"):
    return pytest.warns(ctl.OmissionWarning, match=message)


@pytest.fixture
def half():
    return endings(ctl.WeightInterpolation(t=0.5))


@pytest.mark.parametrize("event", ["saved", "exported", "finished", "deleted"])
def test_a_warning_once_and_only_after_a_step(half, event):
    getattr(half, event)()
    half.stepped()
    with due():
        getattr(half, event)()
    getattr(half, event)()


def test_a_model_saved_with_its_optimizer_is_there_to_go_on(half):
    half.checkpointed()
    half.saved()
    half.stepped()
    half.checkpointed()
    half.saved()
    half.stepped()
    with due("A checkpoint to go on from has the optimizer's state too"):
        half.saved()


def test_what_was_done_is_due_again_after_a_step(half):
    half.stepped()
    half.done = {"weight_interpolation": {"t": 0.5}, **{one.name: {} for one in half._plan.after}}
    assert half.complete
    half.stepped()
    assert (half.done, half.complete) == ({}, False)


def test_phases_are_started_in_order():
    found = endings(ctl.LPFT(epochs=1))
    found.stepped()
    assert not found.complete
    found.started(1)
    found.started(0)  # a phase that was begun anew takes back none
    assert found.complete
    found.deleted()
    three = endings(ctl.GradualUnfreezing(by="layer", epochs=1))
    three.stepped()
    with due(r"phase '\w+' was never started: call start_phase\(1\)"):
        three.finished()


def test_a_model_that_nothing_trains_is_exported_without_its_end_too():
    found = endings(ctl.LayerTransfer(layers=2), ctl.WeightInterpolation(t=0.5))
    with due():
        found.exported()


@pytest.mark.parametrize("told", [True, False])
def test_what_a_block_leaves_out_on_purpose_is_not_said_later(half, told):
    half.stepped()
    if told:
        half.leave_out()
    with half.in_good_hands():
        half.deleted()
        half.done = {one.name: {} for one in half._plan.after}
    half.done = {}
    with nullcontext() if told else due():
        half.deleted()


def test_a_copy_has_made_no_steps(half):
    half.stepped()
    other = copy.copy(half)
    other.deleted()
    with due():
        half.deleted()
