"""Mixout: mixed from a training pass to the gradients, and plain whenever anyone else looks."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import conservtl as ctl
from conservtl.methods.mixout import _draw_mask

X = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1, 0, 1, 0, 1])


def adapted(p=0.5, *others, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
    adaptation = ctl.adapt(model, copy.deepcopy(model), [ctl.Mixout(p=p, **options), *others])
    with torch.no_grad():
        for p_ in model.parameters():
            p_.add_(torch.randn(p_.shape, generator=torch.Generator().manual_seed(2)))
    return adaptation, adaptation.optimizer(torch.optim.SGD, lr=0.1)


def seen_by(adaptation, inputs=X):
    """The first layer's weight while the model runs."""
    caught = []
    handle = adaptation.model[0].register_forward_hook(lambda module, *_: caught.append(module.weight.detach().clone()))
    adaptation.model(inputs)
    handle.remove()
    return caught[0]


def weights(adaptation):
    return {name: p.detach().clone() for name, p in adaptation.model.named_parameters()}


def backward(adaptation):
    F.cross_entropy(adaptation.model(X), Y).backward()


def test_the_mean_over_masks_is_the_weight():
    adaptation, optimizer = adapted(p=0.7)
    plain = adaptation.model[0].weight.detach().clone()
    total = torch.zeros_like(plain)
    for _ in range(4000):
        total += seen_by(adaptation)
        optimizer.step()  # without gradients: nothing moves, a new mask is drawn
    torch.testing.assert_close(total / 4000, plain, atol=0.2, rtol=0)
    torch.testing.assert_close(adaptation.model[0].weight.detach(), plain, rtol=0, atol=0)


def test_each_element_is_the_sources_or_is_scaled_away_from_it():
    adaptation, _ = adapted(p=0.75)
    plain, anchor = adaptation.model[0].weight.detach().clone(), adaptation.start["0.weight"]
    mixed = seen_by(adaptation)
    source = mixed == anchor
    assert 0 < source.sum() < source.numel()
    torch.testing.assert_close(mixed[~source], (anchor + (plain - anchor) / 0.25)[~source])


@pytest.mark.parametrize("p", [0.1, 0.7, 0.999])
def test_masks_hold_the_share_and_their_elements_are_independent(p):
    """Four elements come from one random word: neighbours must not agree more often than chance has it."""
    weight = torch.empty(257, 1031)
    kept = _draw_mask(weight, round(p * 65536), torch.Generator().manual_seed(0)).double()
    margin = 5 * (p * (1 - p) / weight.numel()) ** 0.5
    assert kept.mean() == pytest.approx(1 - p, abs=margin)
    for step in (1, 2, 3, 4, 1031):
        flat = kept.flatten()
        both = (flat[step:] * flat[:-step]).mean()
        assert both == pytest.approx((1 - p) ** 2, abs=2 * margin)


def test_a_mask_goes_by_the_element_however_it_lies_in_memory():
    plain = torch.empty(8, 4, 3, 3)
    masks = [
        _draw_mask(w, 30000, torch.Generator().manual_seed(0))
        for w in (plain, plain.to(memory_format=torch.channels_last))
    ]
    assert torch.equal(*masks)
    assert masks[1].stride() == plain.to(memory_format=torch.channels_last).stride()


def test_a_step_shares_one_mask_and_the_next_has_another():
    adaptation, optimizer = adapted()
    first, second = seen_by(adaptation), seen_by(adaptation)
    assert torch.equal(first, second)
    optimizer.step()
    assert not torch.equal(first, seen_by(adaptation))


def test_the_seed_says_which_masks():
    one, two, other = (seen_by(adapted(seed=seed)[0]) for seed in (3, 3, 4))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_biases_and_what_is_frozen_are_left_alone():
    adaptation, optimizer = adapted(0.5, ctl.LayerTransfer(side="input", layers=1))
    before = weights(adaptation)
    backward(adaptation)
    changed = {name for name, w in weights(adaptation).items() if not torch.equal(w, before[name])}
    assert changed == {"2.weight"}
    optimizer.step()
    assert torch.equal(adaptation.model[0].weight, before["0.weight"])


@pytest.mark.parametrize(
    "look", ["eval", "no_grad", "state_dict", "state", "drift", "restore_weights", "merged", "copy", "finish", "phase"]
)
def test_whoever_looks_in_the_middle_sees_plain_weights(look):
    adaptation, _ = adapted()
    before = weights(adaptation)
    backward(adaptation)
    assert not torch.equal(adaptation.model[0].weight, before["0.weight"])
    found = adaptation.model
    if look == "eval":
        adaptation.model.eval()
        assert torch.equal(seen_by(adaptation), before["0.weight"])
    elif look == "no_grad":
        with torch.no_grad():
            assert torch.equal(seen_by(adaptation), before["0.weight"])
    elif look == "state_dict":
        assert torch.equal(adaptation.model.state_dict()["0.weight"], before["0.weight"])
    elif look == "merged":
        found = adaptation.merged()
    elif look == "copy":
        found = copy.deepcopy(adaptation).model
    else:
        {
            "state": adaptation.state_dict,
            "drift": adaptation.drift,
            "restore_weights": adaptation.restore_weights,
            "finish": adaptation.finish,
            "phase": lambda: adaptation.start_phase(0),
        }[look]()
    assert all(torch.equal(p, before[name]) for name, p in found.named_parameters())


def test_passes_in_one_autocast_see_the_weights_of_their_own():
    """Autocast keeps weights in half precision until its block ends."""
    adaptation, _ = adapted()

    def run(training):
        return adaptation.model.train(training)(X)

    def alone(training):
        with torch.autocast("cpu", torch.bfloat16):
            return run(training)

    with torch.autocast("cpu", torch.bfloat16):
        found = [run(training) for training in (False, True, False)]
    assert all(map(torch.equal, found, map(alone, (False, True, False))))
    assert not torch.equal(found[0], found[1])


def test_what_is_done_at_the_end_is_done_to_plain_weights():
    """Training may end with a forward pass that no step followed."""
    adaptation, _ = adapted(0.5, ctl.WeightInterpolation(t=0.5))
    before, start = weights(adaptation), adaptation.start
    backward(adaptation)
    assert not torch.equal(adaptation.model[0].weight, before["0.weight"])
    adaptation.finish()
    for name, weight in weights(adaptation).items():
        torch.testing.assert_close(weight, (start[name] + before[name]) / 2)


def test_a_look_between_accumulated_batches_changes_nothing():
    """Evaluating in the middle of a step puts the weights back, and the gradients stay those of the mask."""
    (ours, first), (theirs, second) = adapted(), adapted()
    for adaptation, optimizer, looks in ((ours, first, True), (theirs, second, False)):
        for _ in range(2):
            adaptation.model.train()
            backward(adaptation)
            if looks:
                adaptation.model.eval()
                adaptation.model(X)
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(ours.model.parameters(), theirs.model.parameters(), strict=True))


@pytest.mark.parametrize("pulls", [False, True])
def test_a_step_that_a_scaler_skips_leaves_the_weights(pulls):
    """An ordinary optimizer is not even called then, so nobody tells the update."""
    adaptation, optimizer = adapted()
    before = weights(adaptation)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    loss = F.cross_entropy(adaptation.model(X), Y)
    scaler.scale(loss).backward()
    adaptation.model[0].weight.grad[0, 0] = torch.inf
    if pulls:
        adaptation.pull(scaler)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    state = adaptation.model.state_dict()
    assert all(torch.equal(state[name], w) for name, w in before.items())
    backward(adaptation)
    optimizer.step()
    twin, other = adapted()
    backward(twin)
    other.step()
    assert all(torch.equal(a, b) for a, b in zip(adaptation.model.parameters(), twin.model.parameters(), strict=True))


def test_a_phase_that_freezes_what_was_mixed_finds_it_plain():
    adaptation, _ = adapted(0.5, ctl.GradualUnfreezing(phases=[ctl.Stage(epochs=1), ctl.Stage(train=["2"])]))
    before = weights(adaptation)
    adaptation.model(X)
    adaptation.start_phase(1)
    assert torch.equal(adaptation.model[0].weight, before["0.weight"])


def test_a_run_is_plain_at_the_end_and_resumes_bit_for_bit(tmp_path):
    settings = {"batch_size": 3, "lr": 0.1, "optimizer": "sgd"}
    whole, _ = adapted()
    ctl.fit(whole, (X, Y), training=ctl.Training(epochs=3, **settings), seed=1, out=tmp_path / "a")
    calls = 0

    def forward(model, batch):
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return model(batch[0])

    part, _ = adapted()
    with pytest.raises(KeyboardInterrupt):
        ctl.fit(part, (X, Y), training=ctl.Training(epochs=3, **settings), seed=1, out=tmp_path / "b", forward=forward)
    again, _ = adapted()
    ctl.fit(again, (X, Y), training=ctl.Training(epochs=3, **settings), seed=1, out=tmp_path / "b", resume=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True))
    assert not any(key.startswith("plain") for key in whole.state_dict()["updates"]["state"]["mixout"])
