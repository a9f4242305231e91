"""The host's work in a step of ``fit``, in calls of Python beside those of the same step by hand."""

from __future__ import annotations

import signal
import sys
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import conservtl as ctl

DATA = torch.randn(24, 4), torch.arange(24) % 3
SAME_DECAY = ctl.DiscriminativeLR(groups={"*": 1.0}, decay_biases_and_norms=True)  # one group, as by hand


@pytest.fixture(autouse=True)
def _processes_that_load_data():
    """Put in place the handler that torch leaves once there were some: no step asks it."""
    before = signal.signal(signal.SIGCHLD, lambda *_: None)
    yield
    signal.signal(signal.SIGCHLD, before)


def calls_of(run):
    """Return the fewest calls from one forward pass in training to the next."""
    model, seen, stamps = nn.Linear(4, 3), [0], []
    model.register_forward_pre_hook(lambda module, _: stamps.append(seen[0]) if module.training else None)

    def count(_, event, __):
        seen[0] += event == "call"

    sys.setprofile(count)
    try:
        run(model)
    finally:
        sys.setprofile(None)
    return min(later - earlier for earlier, later in pairwise(stamps[6:]))


def by_hand(model, batches):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(4):
        for inputs, labels in batches():
            F.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
            optimizer.zero_grad()


def fit(model, data, *strategies):
    adaptation = ctl.adapt(model, {name: one.clone() for name, one in model.state_dict().items()}, strategies)
    settings = ctl.Training(epochs=4, batch_size=4, lr=0.1, device="cpu", precision="fp32", fused=False)
    ctl.fit(adaptation, data, training=settings)


@pytest.mark.parametrize(("strategies", "most"), [((), 66), ((ctl.L2SP(on="all"),), 92)])
def test_on_held_data(strategies, most):
    indices = torch.arange(24).split(4)
    hand = calls_of(lambda model: by_hand(model, lambda: ((DATA[0][index], DATA[1][index]) for index in indices)))
    assert calls_of(lambda model: fit(model, DATA, SAME_DECAY, *strategies)) <= hand + most


def test_over_a_loader():
    loader = DataLoader(TensorDataset(*DATA), 4)
    hand = calls_of(lambda model: by_hand(model, lambda: loader))
    assert calls_of(lambda model: fit(model, loader, SAME_DECAY)) <= hand + 56
