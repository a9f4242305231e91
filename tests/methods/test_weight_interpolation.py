"""WiSE-FT: what training makes is taken part of the way back, and what is new is not."""

from __future__ import annotations

import copy

import pytest
import torch
from pydantic import ValidationError
from torch import nn

import conservtl as ctl
from conservtl.methods import as_strategy

X = torch.randn(24, 4, generator=torch.Generator().manual_seed(3))
Y = torch.arange(24) % 3
SETTINGS = ctl.Training(device="cpu", epochs=2, batch_size=8, lr=0.05)


def network(classes=3, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, classes))


def adapted(*strategies, source=None, **options):
    return ctl.adapt(network(), network(seed=1) if source is None else source, strategies, **options)


def trained(*strategies, **options):
    adaptation = adapted(*strategies, **options)
    return adaptation, ctl.fit(adaptation, (X, Y), {"target": (X, Y)}, SETTINGS, seed=0)


def state(adaptation):
    return adaptation.model.state_dict()


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_it_is_the_formula_on_what_plain_training_gives(t):
    """And nothing of it is in the training: the history is that of plain fine-tuning."""
    plain, first = trained()
    other, second = trained(ctl.WeightInterpolation(t=t))
    start = adapted().start
    for name, found in state(other).items():
        w1 = state(plain)[name]
        if found.is_floating_point():
            assert torch.allclose(found.double(), (1 - t) * start[name].double() + t * w1.double(), atol=1e-6)
        else:
            assert torch.equal(found, w1)
    assert second.history[-1]["loss"] == first.history[-1]["loss"]
    assert second.after == {"weight_interpolation": {"t": t}}


def test_at_its_ends_it_is_the_source_or_the_training_to_the_bit():
    plain, _ = trained()
    for t, expected in ((0.0, adapted().start), (1.0, state(plain))):
        found = state(trained(ctl.WeightInterpolation(t=t))[0])
        assert all(torch.equal(found[n], w) for n, w in expected.items() if w.is_floating_point())


def test_what_is_new_stays_as_trained():
    """The statistics of a norm that is new too: they started from nothing that is worth going back to."""
    strategies = [ctl.LayerTransfer(layers=["3"], side="output", rest="fresh", freeze=False)]
    plain, _ = trained(*strategies)
    other, _ = trained(*strategies, ctl.WeightInterpolation(t=0.0))
    assert set(other.plan.fresh) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    for name in (*other.plan.fresh, "1.running_mean", "1.running_var"):
        assert torch.equal(state(other)[name], state(plain)[name])
    assert torch.equal(state(other)["3.weight"], network(seed=1)[3].weight)


def test_a_head_for_other_labels():
    other, _ = trained(ctl.WeightInterpolation(t=0.0), source=network(classes=7, seed=1))
    assert torch.equal(state(other)["0.weight"], network(seed=1)[0].weight)
    assert not torch.equal(state(other)["3.weight"], network()[3].weight)


def test_what_is_frozen_does_not_move_by_a_bit():
    other, _ = trained(ctl.LayerTransfer(layers=1), ctl.WeightInterpolation(t=0.37))
    start = adapted().start
    assert all(torch.equal(state(other)[name], start[name]) for name in start if name.startswith(("0.", "1.")))


def test_statistics_are_computed_anew_in_between_only():
    def of(t):
        return trained(ctl.WeightInterpolation(t=t, batch_norm="recompute"))[0]

    between = of(0.5)
    passed = between.model[0](X).detach()
    # Three batches of eight in some order: the mean of their means is the mean of all.
    assert torch.allclose(between.model[1].running_mean, passed.mean(0), atol=1e-5)
    assert torch.equal(of(1.0).model[1].running_mean, trained()[0].model[1].running_mean)
    assert torch.equal(of(0.0).model[1].running_mean, adapted().start["1.running_mean"])


@pytest.mark.parametrize("kind", ["adapted", "source"])
def test_statistics_of_one_end(kind):
    expected = state(trained()[0]) if kind == "adapted" else adapted().start
    found = state(trained(ctl.WeightInterpolation(t=0.5, batch_norm=kind))[0])
    assert torch.equal(found["1.running_var"], expected["1.running_var"])
    assert not torch.equal(found["1.weight"], expected["1.weight"])


def test_without_a_t_the_best_on_the_validation_part_is_taken():
    plain, _ = trained()
    w0, w1 = adapted().start["0.weight"], state(plain)["0.weight"]
    goal = w0 + 0.75 * (w1 - w0)
    adaptation = adapted(ctl.WeightInterpolation(t=None, points=5))

    def metric(outputs, batch):
        return {"closeness": 1.0}

    def loss(outputs, batch):
        return (adaptation.model[0].weight - goal).norm()

    valid = {"target": ctl.Holdout((X, Y), loss=loss, metrics=metric)}
    settings = ctl.Training(device="cpu", epochs=2, batch_size=8, lr=0.05, select="loss")
    result = ctl.fit(adaptation, (X, Y), valid, settings, seed=0)
    facts = result.after["weight_interpolation"]
    assert facts["t"] == 0.75
    assert [point["t"] for point in facts["scores"]] == [0, 0.25, 0.5, 0.75, 1]
    assert max(facts["scores"], key=lambda point: point["score"])["t"] == 0.75
    assert torch.allclose(adaptation.model[0].weight, goal, atol=1e-6)


def test_a_choice_needs_a_validation_part_before_anything_is_trained():
    adaptation = adapted(ctl.WeightInterpolation(t=None))
    with pytest.raises(ctl.SpecError, match="WeightInterpolation chooses on a validation part"):
        ctl.fit(adaptation, (X, Y), training=SETTINGS)
    assert torch.equal(adaptation.model[0].weight, adaptation.start["0.weight"])


def test_in_a_loop_of_ones_own():
    adaptation = adapted(ctl.WeightInterpolation(t=0.25))
    start = adaptation.start
    with torch.no_grad():
        adaptation.model[0].weight.add_(1)
    assert adaptation.finish() == {"weight_interpolation": {"t": 0.25}}
    assert torch.allclose(adaptation.model[0].weight, start["0.weight"] + 0.25)
    again = adapted(ctl.WeightInterpolation(batch_norm="recompute"))
    with pytest.raises(ctl.SpecError, match=r"recomputes statistics.*finish\(batches\)"):
        again.finish()
    best = adapted(ctl.WeightInterpolation(t=None))
    with pytest.raises(ctl.SpecError, match="pass score"):
        best.finish()
    assert best.finish(score=lambda: -float(best.model[0].weight.norm()))["weight_interpolation"]["t"] == 0.5


def test_a_copy_and_a_reloaded_one_go_back_to_the_same_start():
    """Whatever model the adaptation was made for: its start is in its state."""
    first = adapted(ctl.WeightInterpolation(t=0.5))
    with torch.no_grad():
        first.model[0].weight.add_(1)
    again = ctl.adapt(network(), network(seed=9), [ctl.WeightInterpolation(t=0.5)])
    again.model.load_state_dict(first.model.state_dict())
    again.load_state_dict(first.state_dict())
    copied = copy.deepcopy(first)
    copied.finish()
    assert not torch.equal(first.model[0].weight, copied.model[0].weight)
    for one in (first, again):
        one.finish()
        assert torch.equal(one.model[0].weight, copied.model[0].weight)


def test_a_plan_has_one_of_them_and_comes_back_from_json():
    for strategy in (ctl.WeightInterpolation(t=0.3, batch_norm="source"), ctl.WeightInterpolation(t=None, points=4)):
        plan = adapted(strategy).plan
        assert ctl.Plan(**plan.model_dump(mode="json")) == plan
        assert "start" in plan.after[0].describe()
    with pytest.raises(ctl.PlanError, match="both decide 'weight_interpolation'"):
        adapted(ctl.WeightInterpolation(t=0.3), ctl.WeightInterpolation(t=None))


def test_its_short_name():
    assert as_strategy({"kind": "wise_ft", "t": 0.6}) == ctl.WeightInterpolation(t=0.6)


@pytest.mark.parametrize("fields", [{"t": -0.1}, {"t": 1.01}, {"points": 1}, {"batch_norm": "train"}])
def test_bounds(fields):
    with pytest.raises(ValidationError):
        ctl.WeightInterpolation(**fields)
