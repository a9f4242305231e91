"""Two domains of three classes, and a network that knows the source."""

import functools

import pytest
import torch
from torch import nn

import conservtl as ctl


def make_network(classes=3):
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, classes))


def make_examples(n=30, shift=0.0, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    return torch.randn(n, 8, generator=generator) + 2 * torch.eye(8)[labels] + shift * torch.linspace(0, 2, 8), labels


@functools.cache
def _trained():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make_network()
        adaptation = ctl.adapt(model, ctl.itself(missing=[]))
        ctl.fit(adaptation, make_examples(90), training=ctl.Training(epochs=20, lr=1e-2, device="cpu"), seed=0)
    return model.eval()


@pytest.fixture
def source():
    return _trained()


@pytest.fixture
def held_out():
    return {"target": make_examples(30, 1.0, seed=1), "source": make_examples(30, seed=2)}


@pytest.fixture
def quick():
    return ctl.Training(epochs=2, lr=1e-2, device="cpu", threads=1)


@pytest.fixture
def network():
    return make_network


@pytest.fixture
def examples():
    return make_examples
