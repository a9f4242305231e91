"""The pull inside a step: once, by name, on the optimizer it was made for."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.amp import GradScaler

import conservtl as ctl


def adapted(strategy=None):
    model = nn.Linear(2, 2, bias=False)
    strategy = ctl.L2SP(alpha=1.0) if strategy is None else strategy
    adaptation = ctl.adapt(model, {"weight": torch.zeros(2, 2)}, [strategy])
    nn.init.ones_(model.weight)
    return adaptation, adaptation.optimizer(torch.optim.SGD, lr=0.1)


def step(adaptation, optimizer):
    optimizer.zero_grad()
    (0 * adaptation.model.weight).sum().backward()
    optimizer.step()
    return adaptation.model.weight[0, 0].item()


def test_by_hand():
    adaptation, optimizer = adapted()
    assert step(adaptation, optimizer) == pytest.approx(0.9)
    assert step(adaptation, optimizer) == pytest.approx(0.81)


def test_a_step_without_gradients_is_pulled():
    adaptation, optimizer = adapted()
    optimizer.step()
    assert adaptation.model.weight[0, 0].item() == pytest.approx(0.9)


def test_a_copied_optimizer_has_no_hook():
    """torch drops it; the documents say so, and an adaptation makes another."""
    adaptation, optimizer = adapted()
    twin = copy.deepcopy(optimizer)
    twin.param_groups[0]["params"][0].grad = torch.zeros(2, 2)
    twin.step()
    assert twin.param_groups[0]["params"][0][0, 0].item() == 1.0
    assert step(adaptation, adaptation.optimizer(torch.optim.SGD, lr=0.1)) == pytest.approx(0.9)


def test_a_second_optimizer_pulls_for_itself():
    adaptation, first = adapted()
    second = adaptation.optimizer(torch.optim.SGD, lr=0.2)
    assert step(adaptation, second) == pytest.approx(0.8)
    assert step(adaptation, first) == pytest.approx(0.72)


def test_parameters_replaced_in_the_groups_are_pulled_by_name():
    """As Accelerate does when it prepares a model for FSDP2."""
    adaptation, optimizer = adapted()
    adaptation.model.weight = nn.Parameter(torch.full((2, 2), 2.0))
    optimizer.param_groups[0]["params"] = [adaptation.model.weight]
    assert step(adaptation, optimizer) == pytest.approx(1.8)


def test_a_model_moved_after_the_optimizer_was_made():
    adaptation, optimizer = adapted()
    adaptation.model.double()
    assert step(adaptation, optimizer) == pytest.approx(0.9)


@pytest.mark.parametrize("enabled", [True, False])
def test_a_scaler_that_is_off_is_as_none(enabled):
    adaptation, optimizer = adapted()
    scaler = GradScaler("cpu", enabled=enabled)
    scaler.scale((0 * adaptation.model.weight).sum()).backward()
    adaptation.pull(scaler)
    assert torch.equal(adaptation.model.weight.grad, torch.ones(2, 2))
    scaler.step(optimizer)
    assert adaptation.model.weight[0, 0].item() == pytest.approx(0.9)


def test_pull_in_a_step_that_is_given_up():
    """A loop that finds its loss to be NaN clears the gradients and goes on; the next pull is whole."""
    adaptation, optimizer = adapted()
    (0 * adaptation.model.weight).sum().backward()
    adaptation.pull()
    optimizer.zero_grad()
    (0 * adaptation.model.weight).sum().backward()
    adaptation.pull()
    assert torch.equal(adaptation.model.weight.grad, torch.ones(2, 2))
    optimizer.step()
    assert adaptation.model.weight[0, 0].item() == pytest.approx(0.9)


def test_gradients_replaced_after_the_pull_are_not_pulled_again():
    adaptation, optimizer = adapted()
    adaptation.pull()
    adaptation.model.weight.grad = adaptation.model.weight.grad / 2
    optimizer.step()
    assert adaptation.model.weight[0, 0].item() == pytest.approx(0.95)


def test_decoupled_leaves_the_gradients_and_the_optimizers_state_alone():
    adaptation, _ = adapted(ctl.L2SP(alpha=1.0, mode="decoupled"))
    optimizer = adaptation.optimizer(torch.optim.AdamW, lr=0.1)
    assert step(adaptation, optimizer) == pytest.approx(0.9)
    assert not adaptation.model.weight.grad.any()
    assert not optimizer.state[adaptation.model.weight]["exp_avg"].any()
