"""Modes, buffers and gradients are restored after a block, also if it raises."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from conservtl.runtime.preserve import eval_mode, preserve_buffers, preserve_gradients, preserve_modes


@pytest.fixture(params=["well", "badly"])
def ending(request):
    """The last call of a block: it returns, or raises."""

    def end():
        if request.param == "badly":
            raise RuntimeError("out of patience")

    return end


def suppressed(context, act):
    try:
        with context:
            act()
    except RuntimeError as error:
        assert str(error) == "out of patience"  # noqa: PT017


@pytest.fixture
def model():
    made = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout())
    made[1].eval()
    return made


def test_modes(model, ending):
    suppressed(preserve_modes(model), lambda: (model.train(), ending()))
    assert [module.training for module in model.modules()] == [True, True, False, True]


def test_eval_mode(model, ending):
    def look():
        assert not any(module.training for module in model.modules())
        ending()

    suppressed(eval_mode(model), look)
    assert [module.training for module in model.modules()] == [True, True, False, True]


def test_buffers(model, ending):
    """Restored in place: references to a buffer see the old values."""
    model.train()
    held = model[1].running_mean
    suppressed(preserve_buffers(model), lambda: (model(torch.ones(3, 2)), ending()))
    assert model[1].running_mean is held
    assert torch.equal(held, torch.zeros(2))
    assert model[1].num_batches_tracked == 0


def test_gradients(model, ending):
    first, second = model[0].parameters()
    second.requires_grad_(False)
    first.grad = gradient = torch.ones(2, 2)

    def change():
        first.requires_grad_(False)
        second.requires_grad_(True)
        first.grad, second.grad = None, torch.ones(2)
        ending()

    suppressed(preserve_gradients([first, second]), change)
    assert (first.requires_grad, second.requires_grad) == (True, False)
    assert first.grad is gradient
    assert second.grad is None
