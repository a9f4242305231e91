"""The strategy keeps the contract of all strategies, and does what it says."""

import pytest
import torch
from slow_norms import SlowNorms

import conservtl as ctl
from conservtl.testing import check_strategy


def test_it_keeps_the_contract() -> None:
    check_strategy(SlowNorms(factor=0.5))


def test_norms_alone_are_slower() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2))
    plan = ctl.adapt(model, model.state_dict(), [SlowNorms(factor=0.5)]).plan
    assert {row.name: row.scale for row in plan.rows} == {"0.weight": 1, "0.bias": 1, "1.weight": 0.5, "1.bias": 0.5}


def test_a_factor_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="factor"):
        SlowNorms(factor=0)
