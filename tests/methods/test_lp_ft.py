"""LP-FT: the head alone, then everything."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import nn

import conservtl as ctl


def network(classes):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, classes))


def plan(*strategies, classes=3):
    return ctl.adapt(network(classes), network(5), strategies).plan


@pytest.mark.parametrize("classes", [3, 5])
def test_the_head_first_then_everything(classes):
    found = plan(ctl.LPFT(epochs=7, probe=10, fine_tuning=0.1), classes=classes)
    first, last = found.phases
    assert {row.name for row in found.rows} - found.frozen_in(0) == {"4.weight", "4.bias"}
    assert not found.frozen_in(1)
    assert (first.epochs, first.scale, last.epochs, last.scale) == (7, 10, None, 0.1)


def test_what_is_frozen_throughout_stays():
    found = plan(ctl.LPFT(), ctl.LayerTransfer(layers=1))
    assert found.frozen_in(1) == {"0.weight", "0.bias"}


def test_the_body_does_not_move_while_the_head_is_probed():
    adaptation = ctl.adapt(network(3), network(5), [ctl.LPFT(epochs=3)])
    x, y = torch.randn(12, 4), torch.arange(12) % 3
    body = adaptation.model[0].weight.clone()
    result = ctl.fit(adaptation, (x, y), training=ctl.Training(epochs=4, lr=0.1, device="cpu"))
    assert [line["phase"] for line in result.history] == ["linear probe"] * 3 + ["fine-tuning"]
    assert not torch.equal(adaptation.model[0].weight, body)
    again = ctl.adapt(network(3), network(5), [ctl.LPFT(epochs=4)])
    with pytest.raises(ctl.SpecError, match="take at least 5"):
        ctl.fit(again, (x, y), training=ctl.Training(epochs=4, lr=0.1, device="cpu"))


@pytest.mark.parametrize(("epochs", "probed"), [(10, 2), (4, 1), (2, 1), (23, 5)])
def test_the_probe_takes_a_share_of_a_run_of_any_length(epochs, probed):
    """A fixed number leaves a short run with little but the probe."""
    adaptation = ctl.adapt(network(3), network(5), [ctl.LPFT()])
    training = ctl.Training(epochs=epochs, lr=0.1, device="cpu")
    result = ctl.fit(adaptation, (torch.randn(6, 4), torch.arange(6) % 3), training=training)
    assert [line["phase"] for line in result.history].count("linear probe") == probed
    assert "linear probe: 20 % of the epochs" in str(adaptation.plan)
    again = ctl.Plan(**adaptation.plan.model_dump(mode="json"))
    assert again == adaptation.plan


def test_it_is_gradual_unfreezing_by_its_classic_name():
    """The same phases but for their names."""
    ours = plan(ctl.LPFT(epochs=2)).phases
    theirs = plan(ctl.GradualUnfreezing(epochs=2)).phases
    assert [(p.epochs, p.frozen, p.scale) for p in ours] == [(p.epochs, p.frozen, p.scale) for p in theirs]


def test_two_that_set_phases_are_refused():
    with pytest.raises(ctl.PlanError, match="LPFT sets phases"):
        plan(ctl.LPFT(), ctl.GradualUnfreezing())


@pytest.mark.parametrize("fields", [{"epochs": 0}, {"epochs": 0.0}, {"epochs": 1.5}, {"probe": 0}, {"fine_tuning": -1}])
def test_bounds(fields):
    with pytest.raises(ValidationError):
        ctl.LPFT(**fields)
