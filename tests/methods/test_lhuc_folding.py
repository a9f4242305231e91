"""Amplitudes of all norms multiplied into their weights together, when a forward pass begins."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import conservtl as ctl


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.GroupNorm(2, 4)

    def forward(self, x):
        return x + self.norm(self.conv(x)).relu()


class Net(nn.Module):
    """Blocks, of which some may be left out or run in a checkpoint."""

    def __init__(self, blocks=6):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.blocks[1].norm.bias = None
        self.head = nn.Linear(4, 3)
        self.left_out, self.reentrant = (), None

    def forward(self, x):
        for number, block in enumerate(self.blocks):
            if number in self.left_out:
                continue
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x.mean((2, 3)))


X = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def adapted(*strategies, blocks=6):
    torch.manual_seed(0)
    model = Net(blocks).double()
    adaptation = ctl.adapt(model, copy.deepcopy(model), [ctl.LHUC(freeze=False), *strategies])
    with torch.no_grad():
        for block in model.blocks:
            block.norm.lhuc.uniform_(-2, 2)
    return adaptation


def gradients(model, run):
    model.zero_grad()
    run(model).square().sum().backward()
    return {name: one.grad for name, one in model.named_parameters()}


def by_hand(model):
    """The same network with outputs of norms that are scaled one by one."""
    x = X
    for number, block in enumerate(model.blocks):
        if number in model.left_out:
            continue
        norm = block.norm
        values = nn.functional.group_norm(block.conv(x), norm.num_groups, norm.weight, norm.bias, norm.eps)
        x = x + (values * (2 * torch.sigmoid(norm.lhuc)).view(-1, 1, 1)).relu()
    return model.head(x.mean((2, 3)))


@pytest.mark.parametrize("left_out", [(), (2,), (0, 1, 4)])
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_values_and_gradients_are_those_of_scaled_outputs(left_out, reentrant):
    """Also where layers do not run, and in both kinds of checkpoint."""
    model = adapted().model
    model.left_out, model.reentrant = left_out, reentrant
    inputs = X.clone().requires_grad_()  # a reentrant checkpoint needs an input with a gradient
    expected = gradients(model, by_hand)
    torch.testing.assert_close(model(inputs), by_hand(model))
    found = gradients(model, lambda net: net(inputs))
    for name, gradient in expected.items():
        if gradient is None:
            assert found[name] is None or not found[name].any()
        else:
            torch.testing.assert_close(found[name], gradient, msg=lambda text, name=name: f"{name}: {text}")


class Counting(TorchDispatchMode):
    """Counts operations."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func._schema.name.startswith(("aten::sigmoid", "aten::mul", "aten::_foreach_mul"))
        return func(*args, **(kwargs or {}))


def test_the_number_of_operations_does_not_grow_with_that_of_norms():
    counts = []
    for blocks in (3, 9):
        model = adapted(blocks=blocks).model
        with Counting() as counting:
            model(X)
        counts.append(counting.count)
    assert counts[0] == counts[1] <= 3


def test_weights_that_change_when_the_pass_begins():
    """Mixout puts others in their place then; and a part that is called by itself has its own."""
    adaptation = adapted(ctl.Mixout(p=0.5, on="all"))
    adaptation.optimizer(torch.optim.SGD, lr=0.1)
    model = adaptation.model
    torch.testing.assert_close(model(X), by_hand(model))  # the mixed weights stay until the step
    block = model.blocks[0]
    with torch.no_grad():
        block.norm.weight.mul_(3)
    values = nn.functional.group_norm(block.conv(X), 2, block.norm.weight, block.norm.bias)
    scaled = values * (2 * torch.sigmoid(block.norm.lhuc)).view(-1, 1, 1)
    torch.testing.assert_close(block(X), X + scaled.relu())


def test_under_autocast_and_in_eval_mode_without_gradients():
    model = adapted().model.float()
    x = X.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(model(x), model(x))
    with torch.no_grad():
        quiet = model(x)
    torch.testing.assert_close(quiet, model(x).detach())


def test_no_hook_stays_once_amplitudes_are_gone():
    adaptation = adapted()
    merged = adaptation.merged()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in merged.modules())
    ctl.LHUC().retract(adaptation.model)
    assert not any(module._forward_pre_hooks for module in adaptation.model.modules())
