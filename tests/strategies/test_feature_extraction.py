"""Feature extraction: everything held, a new head on top."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import conservtl as ctl


def network(classes=2):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, classes))


def by_layer(plan):
    return {layer: (rows[0].origin, rows[0].frozen) for layer, rows in plan.by_layer()}


def test_a_head_of_the_same_shape_is_made_fresh():
    model, source = network(), {k: torch.zeros(v.shape) for k, v in network().state_dict().items()}
    held = model[2].weight.detach().clone()
    adaptation = ctl.adapt(model, source, [ctl.FeatureExtraction()])
    assert by_layer(adaptation.plan) == {"0": ("source", True), "1": ("source", True), "2": ("fresh", False)}
    assert adaptation.plan["2.weight"].reason == "not asked for"
    assert torch.equal(model[2].weight, held)
    assert not model[0].weight.any()


def test_whatever_does_not_fit_is_the_head():
    plan = ctl.adapt(network(3), network(2).state_dict(), [ctl.FeatureExtraction()]).plan
    assert by_layer(plan) == {"0": ("source", True), "1": ("source", True), "2": ("fresh", False)}
    assert plan["2.weight"].reason.startswith("shape differs")


def test_layers_left_fresh_by_layer_transfer_are_trained_too():
    """Frozen random layers under the head would be of no use; the order of the list does not matter."""
    pair = [ctl.FeatureExtraction(), ctl.LayerTransfer(layers=1, rest="fresh")]
    for strategies in (pair, pair[::-1]):
        plan = ctl.adapt(network(), network().state_dict(), strategies).plan
        assert by_layer(plan) == {"0": ("source", True), "1": ("fresh", False), "2": ("fresh", False)}


def test_layers_that_another_names_stay_as_it_says():
    plan = ctl.adapt(
        network(), network().state_dict(), [ctl.FeatureExtraction(), ctl.LayerTransfer(layers=1, freeze=False)]
    )
    assert by_layer(plan.plan) == {"0": ("source", False), "1": ("source", True), "2": ("fresh", False)}


def test_a_head_that_another_holds_is_refused():
    with pytest.raises(ctl.PlanError, match="FeatureExtraction and LayerTransfer both choose"):
        ctl.adapt(
            network(), network().state_dict(), [ctl.LayerTransfer(side="output", layers=1), ctl.FeatureExtraction()]
        )
