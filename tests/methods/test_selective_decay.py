"""Selective projection decay: which steps it acts on, and how far back it goes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import conservtl as ctl

DECAYED = ctl.DiscriminativeLR(decay=1.0, decay_biases_and_norms=True)


def adapted(*strategies):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
    return ctl.adapt(model, copy.deepcopy(model), strategies)


def gradients(adaptation, seed, sign=1.0):
    generator = torch.Generator().manual_seed(seed)
    for p in adaptation.model.parameters():
        p.grad = sign * torch.randn(p.shape, dtype=p.dtype, generator=generator)


@pytest.mark.parametrize("strength", [0.5, 1.0, 3.0])
def test_adamw_with_it_against_plain_adamw_and_the_formula(strength):
    """The twin makes the optimizer's step from the same weights with the same statistics."""
    ours, theirs = adapted(ctl.SelectiveDecay(strength=strength), DECAYED), adapted()
    first = ours.optimizer(torch.optim.AdamW, lr=0.1)
    second = theirs.optimizer(torch.optim.AdamW, lr=0.1, weight_decay=0.0)
    acted = 0
    for number in range(30):
        before = {name: p.detach().clone() for name, p in ours.model.named_parameters()}
        theirs.model.load_state_dict(before)
        for a in (ours, theirs):
            gradients(a, number)
        for name in ("0.bias", "1.bias"):  # not covered: the optimizer's own decay, which is asked for, acts on them
            dict(theirs.model.named_parameters())[name].data.mul_(1 - 0.1 * 0.01)
        first.step()
        second.step()
        for name, p in ours.model.named_parameters():
            v = dict(theirs.model.named_parameters())[name].detach()
            if name.endswith("weight"):
                w0 = ours.start[name]
                d, grown = v - w0, (v - w0).norm() - (before[name] - w0).norm()
                if (p.grad * (before[name] - w0)).sum() > 0 and grown > 0:
                    acted += 1
                    v = v - min(1.0, strength * float(grown / d.norm())) * d
            torch.testing.assert_close(p.detach(), v)
    assert acted >= 4


@pytest.mark.parametrize(("direction", "expected"), [(1.0, 2.0), (-1.0, 3.0)])
def test_by_hand(direction, expected):
    """The gradient says: back. Momentum goes on, from 2 to 3. All of what it adds is taken back."""
    model = nn.Linear(1, 1, bias=False)
    adaptation = ctl.adapt(model, {"weight": torch.zeros(1, 1)}, [ctl.SelectiveDecay(strength=1.0)])
    optimizer = adaptation.optimizer(torch.optim.SGD, lr=1.0, momentum=1.0)
    model.weight.data.fill_(2.0)
    model.weight.grad = torch.tensor([[direction]])
    optimizer.state[model.weight]["momentum_buffer"] = torch.tensor([[-1.0 - direction]])
    optimizer.step()
    assert model.weight.item() == pytest.approx(expected)


def test_an_optimizer_that_maximises_is_the_same_with_the_sign_turned():
    ours, theirs = adapted(ctl.SelectiveDecay()), adapted(ctl.SelectiveDecay())
    first = ours.optimizer(torch.optim.AdamW, lr=0.1, maximize=True)
    second = theirs.optimizer(torch.optim.AdamW, lr=0.1)
    for number in range(5):
        gradients(ours, number, -1.0)
        gradients(theirs, number)
        first.step()
        second.step()
    for a, b in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_pull_does_not_count_as_the_losss_gradient():
    """It always points away from the source, and would make the decay act in every step."""
    model = nn.Linear(1, 1, bias=False)
    both = [ctl.SelectiveDecay(), ctl.L2SP(alpha=10.0)]
    adaptation = ctl.adapt(model, {"weight": torch.zeros(1, 1)}, both)
    optimizer = adaptation.optimizer(torch.optim.SGD, lr=0.01, momentum=1.0)
    model.weight.data.fill_(1.0)
    model.weight.grad = torch.tensor([[-0.1]])
    optimizer.state[model.weight]["momentum_buffer"] = torch.tensor([[-200.0]])
    optimizer.step()
    assert model.weight.item() > 2


def test_nothing_is_remembered_between_steps():
    adaptation = adapted(ctl.SelectiveDecay())
    optimizer = adaptation.optimizer(torch.optim.AdamW, lr=0.1)
    gradients(adaptation, 0)
    optimizer.step()
    assert adaptation.state_dict()["updates"]["state"] == {"selective_decay": {}}


def test_gradients_that_overflowed_move_nothing():
    """A fused optimizer under a scaler is called and does nothing; products are NaN then."""
    adaptation = adapted(ctl.SelectiveDecay())
    optimizer = adaptation.optimizer(torch.optim.SGD, lr=0.1, fused=True)
    with torch.no_grad():
        for p in adaptation.model.parameters():
            p.add_(1.0)
    before = [p.detach().clone() for p in adaptation.model.parameters()]
    gradients(adaptation, 0)
    adaptation.model[0].weight.grad.fill_(torch.inf)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor([2.0]), torch.tensor([1.0])
    optimizer.step()
    assert all(torch.equal(p, w) for p, w in zip(adaptation.model.parameters(), before, strict=True))


def test_weight_decay_is_off_on_what_it_covers():
    optimizer = adapted(ctl.SelectiveDecay(), DECAYED).optimizer(torch.optim.AdamW, lr=0.1)
    found = {name: group["weight_decay"] for group in optimizer.param_groups for name in group["param_names"]}
    assert found == {"0.weight": 0.0, "0.bias": 0.01, "1.weight": 0.0, "1.bias": 0.01}
