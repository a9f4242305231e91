"""A model moved in place along its line, tensor by tensor, and left at the middle of what is best."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import conservtl as ctl
from conservtl.testing.weights import random_weights
from conservtl.weights.path import WeightPath


def pair():
    """Two networks that differ in every tensor."""
    models = []
    for seed in (1, 2):
        model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
        model.load_state_dict(random_weights(model, seed))
        models.append(model)
    return models


def same(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_model_is_moved_in_place_and_back_exactly():
    source, adapted = pair()
    end = copy.deepcopy(adapted.state_dict())
    line = WeightPath(adapted, {n: t.clone() for n, t in source.state_dict().items()})
    for t in (0.3, 0.0, 0.7, 1.0):
        line.move(t)
        assert same(adapted.state_dict(), ctl.interpolate(source, end, t))


def test_points_in_one_autocast_are_scored_by_their_own_weights():
    """Autocast keeps weights in half precision until its block ends."""
    source, adapted = (model.eval() for model in pair())
    line, inputs = WeightPath(adapted, {n: t.clone() for n, t in source.state_dict().items()}), torch.ones(2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        expected = source(inputs)
        adapted(inputs)
        line.move(0.0)
        assert torch.equal(adapted(inputs), expected)


def test_tied_weights_are_moved_once():
    """The second name of a tensor must not bring the trained value back."""
    model = nn.ModuleDict({"embed": nn.Embedding(4, 3), "out": nn.Linear(3, 4, bias=False)})
    model["out"].weight = model["embed"].weight
    start, end = torch.randn(4, 3), model["embed"].weight.detach().clone()
    WeightPath(model, {"embed.weight": start}).move(0.5)
    assert torch.allclose(model["out"].weight, (start + end) / 2)
    assert model["out"].weight is model["embed"].weight


def test_what_has_no_start_stays():
    source, adapted = pair()
    head, mean = adapted[2].weight.detach().clone(), adapted[1].running_mean.clone()
    WeightPath(adapted, {"0.weight": source[0].weight.detach().clone()}).move(0)
    assert torch.equal(adapted[2].weight, head)
    assert torch.equal(adapted[1].running_mean, mean)
    assert torch.equal(adapted[0].weight, source[0].weight)


@pytest.mark.parametrize(
    ("scores", "margin", "chosen"),
    [
        ([0.1, 0.9, 0.8, 0.7, 0.6], 0.0, 0.25),
        ([0.1, 0.9, 0.9, 0.9, 0.2], 0.0, 0.5),
        ([0.1, 0.2, 0.9, 0.9, 0.2], 0.0, 0.75),
        ([0.9, 0.1, 0.8, 0.9, 0.9], 0.0, 0.0),
        ([0.5, 0.9, 0.88, 0.86, 0.5], 0.05, 0.5),
        ([0.86, 0.5, 0.9, 0.88, 0.86], 0.05, 0.75),
        ([float("nan"), 0.1, float("nan"), 0.3, float("nan")], 0.0, 0.75),
        ([0.5, 0.5, 0.5, 0.5, 0.5], 0.0, 0.5),
    ],
)
def test_the_middle_of_those_as_good_as_the_best_is_chosen(scores, margin, chosen):
    """Of those about the first best, however good others further off may be; and the model is left there."""
    source, adapted = pair()
    end, left = copy.deepcopy(adapted.state_dict()), iter(scores)
    found, tried = WeightPath(adapted, source.state_dict()).choose(5, lambda: next(left), margin)
    assert (found, list(tried)) == (chosen, [0, 0.25, 0.5, 0.75, 1])
    assert same(adapted.state_dict(), ctl.interpolate(source, end, chosen))
