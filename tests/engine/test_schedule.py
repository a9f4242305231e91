"""The factor on all rates: its shapes, and the plan's ratios under it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import conservtl as ctl
from conservtl.engine import schedule_factor

SCHEDULES = ["constant", "cosine", "one_cycle"]


def factors(steps=100, **settings):
    return [schedule_factor(ctl.Training(**settings), step, steps) for step in range(steps)]


def test_constant_is_one():
    assert set(factors()) == {1.0}


def test_cosine_falls_from_one_to_almost_nothing():
    found = factors(schedule="cosine")
    assert found[0] == 1
    assert found == sorted(found, reverse=True)
    assert found[50] == pytest.approx(0.5)
    assert 0 < found[-1] < 1e-3


def test_warm_up_rises_evenly_to_one_and_then_the_schedule_begins():
    found = factors(schedule="cosine", warmup=0.1)
    rises = {round(b - a, 9) for a, b in zip([0.0, *found[:10]], found[:10], strict=False)}
    assert rises == {round(1 / 11, 9)}
    assert found[10] == 1
    assert found[10:] == sorted(found[10:], reverse=True)
    assert factors(warmup=0.1)[10:] == [1.0] * 90


def test_one_cycle_rises_over_30_percent_and_falls_to_almost_nothing():
    found = factors(schedule="one_cycle")
    assert found[0] == pytest.approx(0.04)
    assert found[:31] == sorted(found[:31])
    assert found[30] == 1
    assert found[30:] == sorted(found[30:], reverse=True)
    assert 0 < found[-1] < 1e-3


@given(schedule=st.sampled_from(SCHEDULES), steps=st.integers(1, 500), warmup=st.sampled_from([0.0, 0.05, 0.5]))
def test_every_step_has_a_rate(schedule, steps, warmup):
    """No step has a rate of 0, and none exceeds the rate of the settings."""
    warm = 0.0 if schedule == "one_cycle" else warmup
    assert all(0 < factor <= 1 for factor in factors(steps, schedule=schedule, warmup=warm))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ratios_between_groups_survive(plain, data, schedule):
    """At every step of every phase each group's rate is its initial rate times one factor."""
    adaptation = plain(ctl.DiscriminativeLR(decay=0.5), ctl.GradualUnfreezing(by="layer", scales=(1.0, 0.5)))
    seen = []

    def forward(model, batch):
        if model.training:
            rates = [group["lr"] for group in adaptation.bound.hook.optimizer.param_groups]
            seen.append((adaptation.phase, rates))
        return model(batch[0])

    epochs = len(adaptation.plan.phases) + 1
    training = ctl.Training(device="cpu", epochs=epochs, batch_size=16, lr=0.1, schedule=schedule)
    result = ctl.fit(adaptation, data, training=training, forward=forward, keep_frozen_outputs=False)
    rows = {row.scale for row in adaptation.plan.rows}
    assert len(rows) == 3
    for step, (phase, rates) in enumerate(seen):
        factor = schedule_factor(training, step, len(seen)) * adaptation.plan.phases[phase].scale
        assert {round(rate / (0.1 * factor), 6) for rate in rates} == {round(scale, 6) for scale in rows}
    assert {phase for phase, _ in seen} == set(range(epochs - 1))
    assert [line["phase"] for line in result.history[:2]] == [p.name for p in adaptation.plan.phases[:2]]


def test_phases_train_what_they_say(plain, data):
    """A layer does not change until its phase, and changes in it."""
    adaptation = plain(ctl.GradualUnfreezing(by="layer"))
    moved = []

    def look(outputs, batch):
        moved.append(adaptation.drift())
        return {}

    training = ctl.Training(device="cpu", epochs=3, batch_size=64, lr=0.1)
    ctl.fit(adaptation, data, training=training, metrics=look, watch={"target": data})
    names = list(moved[0])
    assert [[drift[name] > 0 for name in names] for drift in moved] == [
        [False, False, True],
        [False, True, True],
        [True, True, True],
    ]


@pytest.mark.parametrize("epochs", [1, 2])
def test_phases_need_their_epochs(plain, data, epochs):
    with pytest.raises(ctl.SpecError, match=rf"training\.epochs is {epochs}, but the plan's phases"):
        ctl.fit(plain(ctl.GradualUnfreezing(by="layer")), data, training=ctl.Training(device="cpu", epochs=epochs))


def test_a_schedule_needs_a_length(plain, data):
    class Endless:
        def __iter__(self):
            yield data

    with pytest.raises(ctl.SpecError, match="which needs the number of steps, but the training data has no length"):
        ctl.fit(plain(), Endless(), training=ctl.Training(device="cpu", schedule="cosine"))


def test_one_cycle_warms_up_by_itself(plain, data):
    with pytest.raises(ctl.SpecError, match="one_cycle warms up by itself"):
        ctl.fit(plain(), data, training=ctl.Training(device="cpu", schedule="one_cycle", warmup=0.1))


def test_statistics_can_be_held(plain, data):
    """batch_norm="eval" trains the weights and keeps the source's statistics."""
    adaptation = plain()
    before = adaptation.model.stem[1].running_mean.clone()
    ctl.fit(adaptation, data, training=ctl.Training(device="cpu", epochs=2, batch_size=16, batch_norm="eval", lr=0.1))
    assert torch.equal(adaptation.model.stem[1].running_mean, before)
    assert all(moved > 0 for moved in adaptation.drift().values())
