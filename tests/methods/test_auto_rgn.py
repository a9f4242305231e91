"""Rates from relative gradient norms: decided when it is time, on what counts, under any schedule."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import conservtl as ctl

RATE = 0.1


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def adapted(*strategies, fresh=()):
    model = network()
    return ctl.adapt(model, copy.deepcopy(model), strategies, fresh=fresh)


def gradients(adaptation, seed):
    """Random ones, and of no size that the weights would suggest."""
    generator = torch.Generator().manual_seed(seed)
    for p in adaptation.model.parameters():
        p.grad = torch.randn(p.shape, dtype=p.dtype, generator=generator) * torch.rand((), generator=generator)


def snapshot(adaptation):
    return {name: p.detach().clone() for name, p in adaptation.model.named_parameters()}


def shares(optimizer):
    return {group["layer"]: group["share"] for group in optimizer.param_groups}


def ratios(adaptation):
    """By layer, from the formula."""
    found = {}
    for layer in ("0", "2", "4"):
        own = [p for name, p in adaptation.model.named_parameters() if name.startswith(f"{layer}.")]
        g = sum(p.grad.square().sum() for p in own).sqrt()
        found[layer] = float(g / sum(p.detach().square().sum() for p in own).sqrt())
    return found


def over_largest(means):
    return {layer: mean / max(means.values()) for layer, mean in means.items()}


def test_the_mean_since_the_last_decision_decides():
    """The first step by its own gradients; then every three steps by the mean of three."""
    adaptation = adapted(ctl.AutoRGN(every=3))
    optimizer = adaptation.optimizer(torch.optim.SGD, lr=RATE)
    expected, seen = None, []
    for number in range(7):
        gradients(adaptation, number)
        seen.append(ratios(adaptation))
        if number % 3 == 0:
            expected = over_largest({layer: sum(r[layer] for r in seen) / len(seen) for layer in seen[0]})
            seen = []
        before = snapshot(adaptation)
        optimizer.step()
        assert shares(optimizer) == pytest.approx(expected)
        for name, p in adaptation.model.named_parameters():
            torch.testing.assert_close(p.detach(), before[name] - RATE * expected[name[0]] * p.grad)


def test_schedulers_see_rates_that_are_theirs():
    """A LambdaLR sets rates from those it began with; the ratio is on top of whatever it sets."""
    adaptation = adapted(ctl.AutoRGN(every=2))
    optimizer = adaptation.optimizer(torch.optim.SGD, lr=RATE)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    for number in range(5):
        gradients(adaptation, number)
        before = snapshot(adaptation)
        optimizer.step()
        assert {group["lr"] for group in optimizer.param_groups} == {RATE * 0.5**number}
        own = shares(optimizer)
        for name, p in adaptation.model.named_parameters():
            torch.testing.assert_close(p.detach(), before[name] - RATE * 0.5**number * own[name[0]] * p.grad)
        scheduler.step()


def test_it_multiplies_discriminative_rates_and_phases():
    adaptation = adapted(
        ctl.AutoRGN(), ctl.DiscriminativeLR(decay=0.5), ctl.GradualUnfreezing(epochs=1, scales=(1.0, 0.5))
    )
    optimizer = adaptation.optimizer(torch.optim.SGD, lr=RATE)
    adaptation.start_phase(1)
    gradients(adaptation, 0)
    before, expected = snapshot(adaptation), over_largest(ratios(adaptation))
    optimizer.step()
    for name, p in adaptation.model.named_parameters():
        rate = RATE * 0.5 * {"0": 0.25, "2": 0.5, "4": 1.0}[name[0]] * expected[name[0]]
        torch.testing.assert_close(p.detach(), before[name] - rate * p.grad)


def test_a_decoupled_pull_goes_by_the_layers_rate():
    adaptation = adapted(ctl.AutoRGN(), ctl.L2SP(alpha=2, mode="decoupled"))
    optimizer = adaptation.optimizer(torch.optim.SGD, lr=RATE)
    with torch.no_grad():
        adaptation.model[0].weight.add_(1.0)
    gradients(adaptation, 0)
    before, share = snapshot(adaptation), over_largest(ratios(adaptation))["0"]
    optimizer.step()
    expected = before["0.weight"] - RATE * share * (2 * 1.0 + adaptation.model[0].weight.grad)
    torch.testing.assert_close(adaptation.model[0].weight.detach(), expected)


def test_a_threshold_goes_by_the_layers_rate():
    """L1-SP acts after the step, and must still see the rate of the step."""
    adaptation = adapted(ctl.AutoRGN(), ctl.L1SP(alpha=2.0))
    optimizer = adaptation.optimizer(torch.optim.SGD, lr=RATE)
    gradients(adaptation, 0)
    share = over_largest(ratios(adaptation))["0"]
    with torch.no_grad():
        adaptation.model[0].weight.add_(1.0)
        share = over_largest(ratios(adaptation))["0"]
    before = snapshot(adaptation)["0.weight"]
    optimizer.step()
    moved = before - RATE * share * adaptation.model[0].weight.grad - adaptation.start["0.weight"]
    expected = adaptation.start["0.weight"] + moved.sign() * (moved.abs() - RATE * share * 2).clamp(min=0)
    torch.testing.assert_close(adaptation.model[0].weight.detach(), expected)


def test_a_step_that_overflowed_does_not_count():
    """Its norms are infinite, and one of them would end every mean."""
    ours, theirs = adapted(ctl.AutoRGN(every=2)), adapted(ctl.AutoRGN(every=2))
    first, second = (a.optimizer(torch.optim.SGD, lr=RATE) for a in (ours, theirs))
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0, backoff_factor=0.5, growth_interval=99)

    def scaled_step(number, overflow):
        scaler.scale(torch.zeros(()))
        gradients(ours, number)
        for p in ours.model.parameters():
            p.grad *= scaler.get_scale()
        if overflow:
            ours.model[2].weight.grad[0, 0] = torch.inf
        ours.pull(scaler)  # sees the gradients; the scaler makes no step where they are infinite
        scaler.step(first)
        scaler.update()

    for number in range(4):
        if number == 1:
            scaled_step(7, overflow=True)
        scaled_step(number, overflow=False)
        gradients(theirs, number)
        second.step()
    assert shares(first) == pytest.approx(shares(second))


def test_a_fused_scale_changes_nothing_though_it_changes_from_step_to_step():
    ours, theirs = adapted(ctl.AutoRGN(every=2)), adapted(ctl.AutoRGN(every=2))
    first, second = (a.optimizer(torch.optim.SGD, lr=RATE, fused=True) for a in (ours, theirs))
    for number in range(3):
        gradients(theirs, number)
        second.step()
        gradients(ours, number)
        for p in ours.model.parameters():
            p.grad *= 2.0 ** (10 * number)
        first.grad_scale = torch.tensor([2.0 ** (10 * number)])  # as a GradScaler leaves it
        first.step()
    assert shares(first) == pytest.approx(shares(second), rel=1e-5)


def test_what_is_fresh_and_what_is_zero_keep_the_full_rate():
    adaptation = adapted(ctl.AutoRGN(), fresh=["4"])
    with torch.no_grad():
        for p in adaptation.model[2].parameters():
            p.zero_()
    optimizer = adaptation.optimizer(torch.optim.SGD, lr=RATE)
    gradients(adaptation, 0)
    before = snapshot(adaptation)
    optimizer.step()
    for name, p in adaptation.model.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] - RATE * p.grad)  # "0" is the largest of one


def test_the_ratio_is_saved_with_the_optimizer():
    """Between two decisions a resumed run goes on with the ratio of the last."""
    adaptation = adapted(ctl.AutoRGN(every=10))
    optimizer = adaptation.optimizer(torch.optim.AdamW, lr=RATE)
    gradients(adaptation, 0)
    optimizer.step()
    again = adapted(ctl.AutoRGN(every=10))
    other = again.optimizer(torch.optim.AdamW, lr=RATE)
    other.load_state_dict(optimizer.state_dict())
    assert shares(other) == shares(optimizer)
    assert len(set(shares(other).values())) == 3


def test_a_parameter_without_a_gradient_counts_as_one_of_zero():
    adaptation = adapted(ctl.AutoRGN())
    optimizer = adaptation.optimizer(torch.optim.SGD, lr=RATE)
    gradients(adaptation, 0)
    for p in adaptation.model[0].parameters():
        p.grad = None
    optimizer.step()
    assert shares(optimizer)["0"] == 0.0
    assert max(shares(optimizer).values()) == 1.0
