"""The range test finds where training breaks, on a copy: nothing of the adaptation is changed."""

import copy
import random
from dataclasses import replace

import pytest
import torch
from torch import nn

import conservtl as ctl
from conservtl.experiments.advice.lr_range_test import lr_find
from conservtl.experiments.advice.range_curve import RangeTest


def quadratic(strategies=()):
    """A model whose loss is known to diverge under SGD, from a rate that is known."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    return ctl.adapt(model, copy.deepcopy(model), strategies)


def data(n=48):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % 3
    return torch.randn(n, 4, generator=generator) + 2 * torch.eye(4)[labels], labels


def test_rates_rise_geometrically_and_the_suggestion_is_a_tenth_of_one_at_the_minimum():
    found = lr_find(quadratic(), data(), ctl.Training(optimizer="sgd"), highest=1e4)
    ratios = [b / a for a, b in zip(found.rates, found.rates[1:], strict=False)]
    assert ratios == pytest.approx([1e10 ** (1 / 99)] * len(ratios))
    assert found.diverged
    assert len(found.rates) == len(found.losses) == len(found.smoothed) < 100
    at = min(range(len(found.rates)), key=lambda i: abs(found.rates[i] - 10 * found.suggestion))
    assert 10 * found.suggestion == pytest.approx(found.rates[at])
    assert found.smoothed[at] < 0.3 * found.smoothed[0]
    assert found.smoothed[-1] > found.smoothed[at]
    assert found.steepest < 10 * found.suggestion


def test_a_network_with_larger_gradients_gets_a_lower_rate():
    """Inputs ten times as large: under SGD the curvature grows with their square."""
    inputs, labels = data()
    settings = ctl.Training(optimizer="sgd")
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    plain = lr_find(ctl.adapt(model, copy.deepcopy(model)), (inputs, labels), settings, highest=1e4)
    large = lr_find(ctl.adapt(model, copy.deepcopy(model)), (10 * inputs, labels), settings, highest=1e4)
    assert large.suggestion < plain.suggestion / 5


def test_nothing_is_changed():
    adaptation = quadratic([ctl.L2SP()])
    optimizer = adaptation.optimizer(torch.optim.AdamW, lr=1e-3)
    before = copy.deepcopy(adaptation.model.state_dict())
    groups = [group["lr"] for group in optimizer.param_groups]
    torch.manual_seed(5)
    random.seed(5)
    expected = torch.rand(3), random.random()
    torch.manual_seed(5)
    random.seed(5)
    first = lr_find(adaptation, data())
    assert (torch.rand(3).tolist(), random.random()) == (expected[0].tolist(), expected[1])
    assert all(torch.equal(before[name], tensor) for name, tensor in adaptation.model.state_dict().items())
    assert [group["lr"] for group in optimizer.param_groups] == groups
    assert adaptation.model.training
    assert all(parameter.grad is None for parameter in adaptation.model.parameters())
    assert first == lr_find(adaptation, data())


def test_the_plans_pull_is_in_it_and_ends_it_where_it_would_overshoot():
    found = lr_find(quadratic([ctl.L2SP(mode="decoupled", alpha=50)]), data())
    assert found.rates[-1] <= 1 / 50 + 1e-12


def test_what_must_be_measured_first_is():
    found = lr_find(quadratic([ctl.NormAdaptation(train="all", statistics="source"), ctl.FisherSP()]), data())
    assert len(found.rates) >= 10


@pytest.mark.parametrize(
    ("strategies", "options", "says"),
    [
        ([ctl.DiscriminativeLR(source=1e-5, fresh=1e-3)], {}, "absolute rate"),
        ([ctl.LayerTransfer(layers=2)], {}, "trains nothing"),
        ([], {"lowest": 1.0}, "rise"),
        ([], {"steps": 3}, "10 steps"),
    ],
)
def test_bad_input_is_named(strategies, options, says):
    with pytest.raises(ctl.SpecError, match=says):
        lr_find(quadratic(strategies), data(), **options)


def test_data_that_is_not_finite_is_named():
    inputs, labels = data()
    with pytest.raises(ctl.SpecError, match="not finite"):
        lr_find(quadratic(), (torch.full_like(inputs, torch.nan), labels))


def test_the_table_of_rates_read_off():
    found = RangeTest((1e-3, 1e-2, 1e-1), (3.0, 2.0, 9.0), (2.9, 2.1, 8.0), 1e-3, 1e-2, diverged=True)
    shown = found.table()._repr_html_()
    for text in (
        "suggested",
        "1.0e-03",
        "2.9",
        "steepest",
        "1.0e-02",
        "2.1",
        "last",
        "1.0e-01",
        "8",
        "diverged at the",
    ):
        assert text in shown
    assert "did not diverge" in replace(found, diverged=False).table()._repr_html_()
