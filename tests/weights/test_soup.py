"""Soups: the mean of models, all of them or those that help."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import conservtl as ctl
from conservtl.testing import models
from conservtl.testing.weights import random_weights


def states(*values):
    return [{"w": torch.tensor([float(value)])} for value in values]


@settings(max_examples=25, deadline=None)
@given(st.data(), st.integers(2, 7))
def test_equal_models_make_that_model(data, count):
    """To the bit, whatever their number."""
    model, _ = data.draw(models())
    weights = random_weights(model, 3)
    found = ctl.soup([dict(weights) for _ in range(count)])
    assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())


@settings(max_examples=25, deadline=None)
@given(st.data(), st.integers(2, 5))
def test_it_is_the_mean(data, count):
    """Against the plain mean in float64; integers are the first model's."""
    model, _ = data.draw(models())
    several = [random_weights(model, seed) for seed in range(count)]
    for name, found in ctl.soup(several).items():
        if found.is_floating_point():
            expected = torch.stack([weights[name].double() for weights in several]).mean(0)
            assert torch.allclose(found.double(), expected, atol=1e-6)
        else:
            assert torch.equal(found, several[0][name])


def test_of_two_it_is_the_middle_of_the_line():
    one, other = nn.Linear(30, 30), nn.Linear(30, 30)
    found, middle = ctl.soup([one, other]), ctl.interpolate(one, other, 0.5)
    assert all(torch.allclose(found[name], middle[name], atol=1e-7) for name in middle)


def test_many_in_half_precision_are_rounded_once():
    several = [{"w": torch.randn(400).bfloat16()} for _ in range(6)]
    exact = torch.stack([weights["w"].double() for weights in several]).mean(0)
    found = ctl.soup(several)["w"]
    assert found.dtype == torch.bfloat16
    assert torch.allclose(found.double(), exact, rtol=2**-8, atol=1e-6)


def near(target):
    """Higher the nearer the soup is to a target."""
    seen = []

    def score(state):
        seen.append(float(state["w"]))
        return -abs(seen[-1] - target)

    return score, seen


def test_greedy_takes_what_does_not_hurt_in_the_order_of_their_scores():
    score, seen = near(5)
    found = ctl.soup(states(0, 4, 20, 6), score=score)
    # 4 and 6 are equally good, the first of them first; then with 0, then with 20.
    assert seen == pytest.approx([0, 4, 20, 6, 5, 10 / 3, 10])
    assert found["w"].item() == 5


def test_greedy_adds_where_it_makes_no_difference():
    assert ctl.soup(states(1, 3), score=lambda _: 0.5)["w"].item() == 2


def test_greedy_is_never_worse_than_the_best():
    score, _ = near(7)
    assert ctl.soup(states(100, 7, -100, 30), score=score)["w"].item() == 7


def test_greedy_keeps_the_integers_of_the_best():
    several = [{"w": torch.tensor([float(n)]), "count": torch.tensor(n)} for n in (1, 2, 3)]
    score, _ = near(3)
    assert ctl.soup(several, score=score)["count"].item() == 3


def test_the_models_are_left_alone_by_soup_and_score():
    several = states(1, 3)

    def score(state):
        state["w"].zero_()
        return 0.0

    ctl.soup(several, score=score)
    ctl.soup(several)["w"].zero_()
    assert [weights["w"].item() for weights in several] == [1, 3]


@pytest.mark.parametrize("models", [[nn.Linear(2, 2)], [], nn.Linear(2, 2), "model.safetensors"])
def test_a_soup_of_one_is_refused(models):
    with pytest.raises(ctl.SpecError, match="list of at least 2 models; received"):
        ctl.soup(models)


def test_other_structures_are_refused():
    with pytest.raises(ctl.SourceError, match=r"'weight' must have one shape.*\(2, 2\) in the first and \(1, 2\)"):
        ctl.soup([nn.Linear(2, 2), nn.Linear(2, 1)])
    with pytest.raises(ctl.SourceError, match=r"'bias'.*none in model 3"):
        ctl.soup([nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2, bias=False)])
    with pytest.raises(ctl.SourceError, match=r"'bias'.*none in the first"):
        ctl.soup([nn.Linear(2, 2, bias=False), nn.Linear(2, 2)])
