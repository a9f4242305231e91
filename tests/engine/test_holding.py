"""Where data and cached outputs are held, and that nothing is where the settings say never."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import conservtl as ctl
from conservtl.engine.holding import Holding

GPU, HOST = torch.device("cuda", 0), torch.device("cpu")
GIB = 1 << 30


@pytest.mark.parametrize(
    ("hold", "places", "rooms"),
    [
        ("auto", [GPU, HOST, GPU], [HOST, GPU]),
        ("host", [HOST] * 3, [HOST, HOST]),
        ("never", [HOST] * 3, [GPU, GPU]),  # no cache asks, then
    ],
)
def test_sets_and_caches_share_the_budget(hold, places, rooms):
    holding = Holding(hold, memory=1.0)
    sizes = [GIB // 2, GIB, GIB // 4]
    assert [holding.place(size, GPU) for size in sizes] == places
    assert [holding.room(size, GPU) for size in (GIB // 2, GIB // 4)] == rooms


def test_memory_that_is_released_counts_again():
    holding = Holding(memory=1.0)
    assert holding.room(GIB, GPU) == GPU
    assert holding.room(GIB, GPU) == HOST
    holding.release(GIB, GPU)
    holding.release(GIB, HOST)
    assert holding.room(GIB, GPU) == GPU


def test_data_that_must_be_on_the_device_is_refused_but_not_a_cache():
    holding = Holding("device", memory=0.5)
    with pytest.raises(ctl.SpecError, match=r"hold is device, but the data takes 1 GiB, and 0.5 GiB .*hold_memory"):
        holding.place(GIB, GPU)
    assert holding.room(GIB, GPU) == HOST


class Counted(nn.Module):
    """Counts the forward passes of its input side."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.passes = 0

    def forward(self, x):
        self.passes += 1
        return self.head(self.second(self.first(x).relu()).relu())


def trained(hold, monkeypatch):
    """Return the passes of the source, those of the frozen layer, the weights and the result's parameters."""
    torch.manual_seed(0)
    model = Counted()
    source, frozen = copy.deepcopy(model), []
    linear = nn.functional.linear
    adaptation = ctl.adapt(model, source, [ctl.OutputConservation(), ctl.LayerTransfer(layers=1)])
    weight = model.first.weight
    monkeypatch.setattr(
        nn.functional, "linear", lambda x, w, b=None: (frozen.append(1) if w is weight else None, linear(x, w, b))[1]
    )
    data = torch.randn(12, 3, generator=torch.Generator().manual_seed(1)), torch.arange(12) % 2
    before = adaptation.origin.source_model.passes
    training = ctl.Training(epochs=5, batch_size=4, lr=1e-2, hold=hold, device="cpu", batch_norm="eval")
    ctl.fit(adaptation, data, training=training, seed=0)
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    return adaptation.origin.source_model.passes - before, len(frozen), weights


def test_never_computes_outputs_in_each_step(monkeypatch):
    """Of the source and of the frozen layer; the training is the same."""
    steps = 15
    cached, cached_frozen, weights = trained("auto", monkeypatch)
    passes, frozen, same = trained("never", monkeypatch)
    assert passes == steps > cached
    assert frozen == steps > cached_frozen
    for one, other in zip(same, weights, strict=True):
        torch.testing.assert_close(one, other)
