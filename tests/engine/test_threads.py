"""``threads: auto`` chooses between one thread and all by timing the first steps."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

import conservtl as ctl
from conservtl.engine import execution as threads
from conservtl.engine.execution import ThreadTimer

SETTINGS = {"epochs": 5, "batch_size": 16, "lr": 0.01, "device": "cpu", "threads": "auto"}


class Clock:
    """Clock that advances in forward passes only, by given seconds per example for each number of threads."""

    def __init__(self, costs):
        self.costs, self.now, self.used = costs, 0.0, []

    def __call__(self):
        return self.now

    def forward(self, model, batch):
        if model.training:
            self.used.append(torch.get_num_threads())
            self.now += len(batch[0]) * self.costs[torch.get_num_threads()]
        return model(batch[0])


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def clock(monkeypatch):
    """Return a function that makes the clock of the engine."""

    def make(one, two):
        made = Clock({1: one, 2: two})
        monkeypatch.setattr(threads, "perf_counter", made)
        return made

    return make


CASES = {
    "a second only waits": (1.0, 1.0, 1),
    "a second is in the way": (1.0, 20.0, 1),
    "a second saves a twentieth": (1.0, 0.95, 1),
    "a second halves the time": (1.0, 0.5, 2),
}


@pytest.mark.parametrize("name", CASES)
def test_it_chooses(plain, data, clock, name):
    """The choice holds from the thirteenth step; batches of 16, 16, 16 and 2 are compared per example."""
    one, two, chosen = CASES[name]
    made = clock(one, two)
    ctl.fit(plain(), data, training=ctl.Training(**SETTINGS), forward=made.forward, seed=0)
    assert made.used == [2, 1] * 6 + [chosen] * 8
    assert torch.get_num_threads() == 2, "as it was found"


def test_it_changes_nothing_but_rounding(plain, data, clock):
    ours, theirs = plain(), plain()
    made, settings = clock(1.0, 1.0), {**SETTINGS, "optimizer": "sgd"}
    ctl.fit(ours, data, training=ctl.Training(**settings), forward=made.forward, seed=0)
    ctl.fit(theirs, data, training=ctl.Training(**{**settings, "threads": None}), seed=0)
    for a, b in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_each_phase_is_timed(plain, data, clock):
    """Times of a phase that trains the head alone do not hold for one that trains everything."""
    made = clock(1.0, 0.5)
    adaptation = plain(ctl.GradualUnfreezing(epochs=4))
    settings = ctl.Training(**{**SETTINGS, "epochs": 8})
    ctl.fit(adaptation, data, training=settings, forward=made.forward, seed=0, keep_frozen_outputs=False)
    first = len(made.used) // len(adaptation.plan.phases)
    assert made.used[:first] == [2, 1] * 6 + [2] * (first - 12)
    assert made.used[first : first + 12] == [2, 1] * 6


@pytest.mark.parametrize("at", [6, 17], ids=["while timing", "after it"])
def test_a_resumed_run_keeps_the_choice(plain, data, same, clock, interrupting, tmp_path, at):
    """Whatever the clock shows after resuming: another number of threads would round otherwise."""
    whole = plain()
    made = clock(1.0, 1.0)
    ctl.fit(whole, data, training=ctl.Training(**SETTINGS), forward=made.forward, seed=0)
    stop = interrupting(at)
    with pytest.raises(KeyboardInterrupt):
        ctl.fit(
            plain(),
            data,
            training=ctl.Training(**SETTINGS),
            forward=lambda model, batch: (made.forward(model, batch), stop(model, batch))[0],
            seed=0,
            out=tmp_path,
        )
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["state"]["threads"]
    assert saved == ({} if at == 6 else {0: 1})
    resumed, later = plain(), clock(1.0, 0.1)
    ctl.fit(
        resumed,
        data,
        training=ctl.Training(**SETTINGS),
        forward=later.forward,
        seed=0,
        out=tmp_path,
        resume=True,
    )
    if at == 17:
        assert later.used == [1] * 3
    else:
        assert later.used[:12] == [2, 1] * 6


def test_one_thread_is_not_timed(plain, data, clock):
    torch.set_num_threads(1)
    made = clock(1.0, 1.0)
    ctl.fit(plain(), data, training=ctl.Training(**SETTINGS), forward=made.forward)
    assert set(made.used) == {1}


def test_a_choice_made_before_is_taken_up():
    timer = ThreadTimer({3: 1}, 2)
    timer.begin(3)
    assert torch.get_num_threads() == 1
    with timer.step():
        pass
    assert timer.chosen == {3: 1}


@pytest.mark.parametrize("value", [0, -1, "many", 1.5])
def test_other_values_are_refused(value):
    with pytest.raises(ValidationError, match="threads"):
        ctl.Training(threads=value)
