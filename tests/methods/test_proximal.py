"""Proximal steps: weights return to the source exactly, at the rate of the step."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import conservtl as ctl

BOTH = pytest.mark.parametrize("cls", [ctl.L1SP, ctl.GroupLassoSP])


def adapted(*strategies, fresh=()):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(3, 4, 3), nn.Flatten(), nn.Linear(8, 2))
    return ctl.adapt(model, copy.deepcopy(model), strategies, fresh=fresh)


def gradients(adaptation, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in adaptation.model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


@BOTH
def test_weights_return_to_the_source_bit_for_bit(cls):
    adaptation = adapted(cls(alpha=1.0))
    optimizer = adaptation.optimizer(torch.optim.SGD, lr=0.01)
    weight, start = adaptation.model[0].weight, adaptation.start["0.weight"]
    with torch.no_grad():
        weight[0] += 1.0
        weight[1:] += 1e-3 * torch.randn(3, 3, 3)
    for p in adaptation.model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.equal(weight[1:], start[1:])
    torch.testing.assert_close(weight[0] - start[0], torch.full((3, 3), 1.0 - 0.01))  # sqrt(9) of norm 3: the same


@pytest.mark.parametrize(
    ("cls", "shrink"),
    [
        (ctl.L1SP, lambda d, t: d.sign() * (d.abs() - t).clamp(min=0)),
        (
            ctl.GroupLassoSP,
            lambda d, t: (
                d.flatten(1) * (1 - t * d[0].numel() ** 0.5 / d.flatten(1).norm(dim=1, keepdim=True)).clamp(min=0)
            ).view_as(d),
        ),
    ],
)
def test_adamw_then_the_operator_at_the_rate_of_the_schedule(cls, shrink):
    ours, theirs = adapted(cls(alpha=0.5)), adapted()
    first = ours.optimizer(torch.optim.AdamW, lr=0.1)
    second = theirs.optimizer(torch.optim.AdamW, lr=0.1, weight_decay=0.0)
    for number in range(4):
        theirs.model.load_state_dict(ours.model.state_dict())
        for adaptation, optimizer in ((ours, first), (theirs, second)):
            gradients(adaptation, number)
            for group in optimizer.param_groups:
                group["lr"] = 0.1 / (number + 1)
            optimizer.step()
        for name in ("0.weight", "2.weight"):
            v = theirs.model.get_parameter(name).detach().double()
            w0 = ours.start[name].double()
            expected = (w0 + shrink(v - w0, 0.5 * 0.1 / (number + 1))).float()
            torch.testing.assert_close(ours.model.get_parameter(name).detach(), expected)


def test_with_l2_sp_it_is_an_elastic_net():
    """For plain SGD on a loss of nothing: one shrinks by a factor, the other by an amount."""
    adaptation = adapted(ctl.L1SP(alpha=0.5), ctl.L2SP(alpha=2.0, beta=0.01))
    optimizer = adaptation.optimizer(torch.optim.SGD, lr=0.1)
    with torch.no_grad():
        adaptation.model[0].weight.add_(1.0)
    optimizer.step()
    expected = adaptation.start["0.weight"] + (1 - 0.1 * 2.0) * 1.0 - 0.1 * 0.5
    torch.testing.assert_close(adaptation.model[0].weight.detach(), expected)


@BOTH
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
def test_fresh_weights_decay_once_beside_a_pull_with_the_same_beta(cls, mode, turned):
    """The default betas agree. Decoupled, AdamW's statistics see no decay: without a gradient nothing else moves."""
    strategies = [cls(alpha=0.5), ctl.L2SP(alpha=2.0, mode=mode)]
    adaptation = adapted(*(reversed(strategies) if turned else strategies), fresh=["2"])
    optimizer = adaptation.optimizer(torch.optim.SGD if mode == "coupled" else torch.optim.AdamW, lr=0.1)
    head = adaptation.model[2].weight.detach().clone()
    with torch.no_grad():
        adaptation.model[0].weight.add_(1.0)
    for parameter in adaptation.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(adaptation.model[2].weight.detach(), head * (1 - 0.1 * 0.01))
    expected = adaptation.start["0.weight"] + (1 - 0.1 * 2.0) * 1.0 - 0.1 * 0.5  # all of a row alike: the same for both
    torch.testing.assert_close(adaptation.model[0].weight.detach(), expected)


def test_both_penalties_together():
    """Sparse group lasso: two updates, not one that replaces the other."""
    adaptation = adapted(ctl.L1SP(alpha=0.5), ctl.GroupLassoSP(alpha=0.5))
    optimizer = adaptation.optimizer(torch.optim.SGD, lr=0.1)
    with torch.no_grad():
        adaptation.model[0].weight.add_(1.0)
    optimizer.step()
    torch.testing.assert_close(adaptation.model[0].weight.detach(), adaptation.start["0.weight"] + 1 - 0.05 - 0.05)


@BOTH
def test_what_is_fresh_gets_plain_l2_and_no_threshold(cls):
    adaptation = adapted(cls(alpha=0.5, beta=0.25), fresh=["2"])
    optimizer = adaptation.optimizer(torch.optim.SGD, lr=0.1)
    before = adaptation.model[2].weight.detach().clone()
    optimizer.step()
    torch.testing.assert_close(adaptation.model[2].weight.detach(), before * (1 - 0.1 * 0.25))
    assert adapted(cls(beta=None), fresh=["2"]).plan["2.weight"].decay is None


@BOTH
def test_a_step_that_is_skipped_moves_nothing(cls):
    adaptation = adapted(cls(alpha=5.0))
    optimizer = adaptation.optimizer(torch.optim.SGD, lr=0.1, fused=True)
    with torch.no_grad():
        adaptation.model[0].weight.add_(1.0)
    before = adaptation.model[0].weight.detach().clone()
    gradients(adaptation, 0)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor([2.0]), torch.tensor([1.0])
    optimizer.step()
    assert torch.equal(adaptation.model[0].weight, before)
    optimizer.found_inf = torch.tensor([0.0])
    optimizer.step()
    assert not torch.equal(adaptation.model[0].weight, before)


@BOTH
def test_a_scalar_and_a_vector_are_covered_by_all(cls):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.tensor(2.0))
            self.out = nn.Linear(2, 2)

        def forward(self, x):
            return self.out(x) * self.gain

    source, model = Net(), Net()
    adaptation = ctl.adapt(model, source, [cls(alpha=1.0, on="all")])
    optimizer = adaptation.optimizer(torch.optim.SGD, lr=0.01)
    with torch.no_grad():
        model.gain.add_(1.0)
        model.out.bias.add_(1.0)
    optimizer.step()
    assert model.gain.item() == pytest.approx(2.99)
    torch.testing.assert_close(model.out.bias.detach(), adaptation.start["out.bias"] + 0.99)
