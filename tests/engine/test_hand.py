"""Without strategies the engine equals a hand-written loop, bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import conservtl as ctl
from conservtl.engine import schedule_factor

OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}),
    "adam": (torch.optim.Adam, {"lr": 0.01}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01}),
}


def by_hand(model):
    """Groups as they are commonly written: weight decay on matrices alone, not on biases and norms."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    return [{"params": matrices}, {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0}]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_held_data(plain, data, hand, same, name, accumulate):
    """Tensors, shuffled by one randperm an epoch, with dropout, batch norm and a last group of one batch."""
    adaptation = plain()
    model = copy.deepcopy(adaptation.model)
    cls, options = OPTIMIZERS[name]
    torch.manual_seed(3)
    hand(
        model,
        cls(by_hand(model), **options),
        lambda: ((data[0][i], data[1][i]) for i in torch.randperm(50).split(16)),
        3,
        accumulate,
    )
    training = ctl.Training(
        device="cpu", epochs=3, batch_size=16, optimizer=name, lr=options["lr"], accumulate=accumulate
    )
    result = ctl.fit(adaptation, data, training=training, seed=3)
    assert same(adaptation.model, model)
    assert result.steps == 3 * (4 if accumulate == 1 else 2)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("length", [True, False])
def test_data_loader(plain, data, hand, same, accumulate, length):
    """A shuffled DataLoader, and one without a length."""
    adaptation = plain()
    model = copy.deepcopy(adaptation.model)
    loader = DataLoader(TensorDataset(*data), 16, shuffle=True)
    source = loader if length else _WithoutLength(loader)
    torch.manual_seed(3)
    hand(model, torch.optim.AdamW(by_hand(model), lr=0.01), lambda: loader, 3, accumulate)
    ctl.fit(adaptation, source, training=ctl.Training(device="cpu", epochs=3, lr=0.01, accumulate=accumulate), seed=3)
    assert same(adaptation.model, model)


@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
def test_clipping_with_a_pull(plain, data, same, mode):
    """Clipping includes the pull, like a penalty in the loss; a decoupled pull moves weights before the step."""
    adaptation = plain(ctl.L2SP(alpha=0.5, beta=0.1, mode=mode))
    other = copy.deepcopy(adaptation)
    training = ctl.Training(device="cpu", epochs=3, batch_size=16, optimizer="sgd", lr=0.05, clip=0.3)
    ctl.fit(adaptation, data, training=training, seed=3)

    torch.manual_seed(3)
    optimizer = other.optimizer(torch.optim.SGD, lr=0.05, momentum=0.9, pull=mode == "decoupled")
    norms = []
    for _ in range(3):
        for index in torch.randperm(50).split(16):
            loss = F.cross_entropy(other.model(data[0][index]), data[1][index])
            (loss + other.penalty() if mode == "coupled" else loss).backward()
            norms.append(nn.utils.clip_grad_norm_(other.model.parameters(), 0.3))
            optimizer.step()
            optimizer.zero_grad()
    assert max(norms) > 0.3
    for (name, a), b in zip(adaptation.model.state_dict().items(), other.model.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "one_cycle"])
def test_the_pull_stays_exact_under_accumulation_and_schedules(plain, data, schedule):
    """With any schedule and accumulation the pull equals the penalty in the loss, once per step."""
    adaptation = plain(ctl.L2SP(alpha=0.5, beta=0.1), dropout=0.0)
    other = copy.deepcopy(adaptation)
    training = ctl.Training(
        device="cpu", epochs=2, batch_size=16, optimizer="sgd", lr=0.05, accumulate=2, schedule=schedule
    )
    ctl.fit(adaptation, data, training=training, seed=3)

    torch.manual_seed(3)
    optimizer = other.optimizer(torch.optim.SGD, lr=0.05, momentum=0.9, pull=False)
    step = 0
    for _ in range(2):
        batches = list(torch.randperm(50).split(16))
        for group in (batches[:2], batches[2:]):
            for part in optimizer.param_groups:
                part["lr"] = 0.05 * schedule_factor(training, step, 4)
            for index in group:
                (F.cross_entropy(other.model(data[0][index]), data[1][index]) / 2).backward()
            other.penalty().backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
    for a, b in zip(adaptation.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    length=st.integers(2, 20),
    batch=st.integers(1, 8),
    accumulate=st.integers(1, 4),
    name=st.sampled_from(sorted(OPTIMIZERS)),
)
def test_any_sizes(hand, same, length, batch, accumulate, name):
    """For any length of data, batch and group, and any optimizer."""
    assume(batch == 1 or length % batch != 1)
    torch.manual_seed(1)
    inputs, labels = torch.randn(length, 5), torch.randint(0, 3, (length,))
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    adaptation = ctl.adapt(copy.deepcopy(model), copy.deepcopy(model))
    cls, options = OPTIMIZERS[name]
    torch.manual_seed(2)
    hand(
        model,
        cls(by_hand(model), **options),
        lambda: [(inputs[i], labels[i]) for i in torch.randperm(length).split(batch)],
        2,
        accumulate,
    )
    training = ctl.Training(
        device="cpu", epochs=2, batch_size=batch, optimizer=name, lr=options["lr"], accumulate=accumulate
    )
    ctl.fit(adaptation, (inputs, labels), training=training, seed=2)
    assert same(adaptation.model, model)


def test_evaluation_does_not_disturb_training(plain, data, same):
    """Evaluations while training do not change the weights."""
    alone, watched = plain(), plain()
    training = ctl.Training(device="cpu", epochs=3, batch_size=16, lr=0.01)
    ctl.fit(alone, data, training=training, seed=3)
    loader = DataLoader(TensorDataset(*data), 16, shuffle=True)
    ctl.fit(watched, data, {"target": data}, training, watch={"source": loader}, seed=3)
    assert same(alone.model, watched.model)


def test_frozen_layers_stand_still(plain, data):
    """Frozen parameters and running statistics do not change, whatever the optimizer decays."""
    adaptation = plain(ctl.LayerTransfer(side="input", layers=1))
    before = copy.deepcopy(adaptation.model.stem.state_dict())
    training = ctl.Training(device="cpu", epochs=2, batch_size=16, optimizer="adamw", lr=0.1, weight_decay=0.1)
    ctl.fit(adaptation, data, training=training, augment=lambda batch, _: batch)
    assert all(torch.equal(tensor, before[name]) for name, tensor in adaptation.model.stem.state_dict().items())
    drift = adaptation.drift()
    assert drift.pop(adaptation.plan.layers[0]) == 0
    assert all(moved > 0 for moved in drift.values())


class _WithoutLength:
    def __init__(self, loader):
        self.loader = loader

    def __iter__(self):
        return iter(self.loader)
