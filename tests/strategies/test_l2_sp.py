"""L2-SP: which parameters, how hard, and by which of its two methods."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import nn

import conservtl as ctl
from conservtl.strategies import apply_all
from conservtl.testing.choices import whole_plan


class Mixed(nn.Module):
    """One of each kind of parameter."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(5, 4)
        self.lstm = nn.LSTM(4, 3)
        self.norm = nn.LayerNorm([1, 3])  # of two dimensions, and still a norm
        self.conv = nn.Conv1d(3, 3, 3)
        self.bn = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 2)


WEIGHTS = {"words.weight", "lstm.weight_ih_l0", "lstm.weight_hh_l0", "conv.weight", "head.weight"}


def deep():
    return nn.Sequential(*(nn.Linear(2, 2) for _ in range(5)))


def pulls(strategy, model):
    return {row.name: row.pull for row in apply_all(whole_plan(model), [strategy]).rows if row.pull is not None}


def test_weights_include_embeddings_and_recurrent_matrices_but_no_norms():
    assert pulls(ctl.L2SP(alpha=0.5), Mixed()) == dict.fromkeys(WEIGHTS, 0.5)


def test_all_is_all():
    model = Mixed()
    assert set(pulls(ctl.L2SP(on="all"), model)) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize(("mode", "alpha"), [("coupled", 0.1), ("decoupled", 10.0)])
def test_two_methods_two_defaults(mode, alpha):
    plan = apply_all(whole_plan(deep()), [ctl.L2SP(mode=mode)])
    assert {row.pull for row in plan.rows if row.kind == "weight"} == {alpha}
    assert {row.mode for row in plan.rows if row.kind == "weight"} == {mode}
    assert plan["0.bias"].pull is None
    assert pulls(ctl.L2SP(mode=mode, alpha=0.3), deep())["0.weight"] == 0.3


@pytest.mark.parametrize(
    ("depth", "expected"),
    [(None, [2, 2, 2, 2, 2]), ((1, 0), [2, 1.5, 1, 0.5, 0]), ((0.1, 1), [0.2, 0.65, 1.1, 1.55, 2])],
)
def test_depth_is_linear_from_side_to_side(depth, expected):
    found = pulls(ctl.L2SP(alpha=2.0, depth=depth), deep())
    assert [found[f"{i}.weight"] for i in range(5)] == pytest.approx(expected)


def test_beta_on_what_is_fresh_alpha_on_what_is_not():
    model = deep()
    source = {name: torch.zeros(t.shape) for name, t in model.state_dict().items() if not name.startswith("4")}
    plan = ctl.adapt(model, source, [ctl.L2SP(alpha=0.5, beta=0.25)]).plan
    assert (plan["3.weight"].pull, plan["3.weight"].decay) == (0.5, None)
    assert (plan["4.weight"].pull, plan["4.weight"].decay) == (None, 0.25)
    assert (plan["4.bias"].pull, plan["4.bias"].decay) == (None, None)
    assert not plan["4.bias"].covered


def test_zero_covers_too():
    """alpha = 0 keeps the optimizer's weight decay off, as every value of the grid does."""
    assert apply_all(whole_plan(deep()), [ctl.L2SP(alpha=0.0)])["0.weight"].covered


def test_two_are_refused():
    with pytest.raises(ctl.PlanError, match="L2SP and L2SP both choose the pull"):
        apply_all(whole_plan(deep()), [ctl.L2SP(), ctl.L2SP(alpha=1.0, on="all")])


@pytest.mark.parametrize(
    "fields",
    [{"alpha": -0.1}, {"alpha": float("nan")}, {"beta": float("inf")}, {"depth": (-1, 1)}, {"mode": "both"}, {"a": 1}],
)
def test_bounds(fields):
    with pytest.raises(ValidationError):
        ctl.L2SP(**fields)
