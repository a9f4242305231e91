"""Sums of squared gradients of single examples equal those of a plain loop."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import conservtl as ctl
from conservtl.layers import named_parameters
from conservtl.runtime.per_example import PerExample

X = torch.randn(7, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1, 2, 0, 1, 2, 0])


class Mean(nn.Module):
    """A body and a head on its mean over time; ``touch`` is applied to the inputs first."""

    def __init__(self, body, width, touch=lambda x: x):
        super().__init__()
        self.body, self.head, self.touch = body, nn.Linear(width, 3), touch

    def forward(self, x):
        found = self.body(self.touch(x))
        return self.head((found[0] if isinstance(found, tuple) else found).mean(1))


def branching(x):
    return x if x.sum() > 0 else -x


def writing(x):
    counted = torch.zeros(3, dtype=x.dtype)
    counted.add_(x.sum((0, 1)))
    return x + counted


MODELS = {
    "linear": lambda: Mean(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(5), nn.Tanh()), 4),
    "lstm": lambda: Mean(nn.LSTM(3, 4, batch_first=True, bidirectional=True), 8),
    "branches on values": lambda: Mean(nn.Linear(3, 4), 4, touch=branching),
    "writes into a buffer": lambda: Mean(nn.Linear(3, 4), 4, touch=writing),
    "in place": lambda: Mean(nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True)), 4),
    "transformer": lambda: Mean(nn.TransformerEncoderLayer(3, 1, 8, batch_first=True), 3),
}


def value(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def plain(model, x, y, weights):
    total = {name: torch.zeros_like(p) for name, p in named_parameters(model).items()}
    for i in range(len(x)):
        model.zero_grad()
        (-model(x[i : i + 1]).log_softmax(-1)[0, y[i]]).backward()
        for name, p in named_parameters(model).items():
            if p.grad is not None:
                total[name] += weights[i] * p.grad**2
    model.zero_grad()
    return total


@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_every_example_for_itself(name, weighted, monkeypatch):
    """The sum equals that of a loop over examples, whether ``vmap`` accepts the model or not."""
    monkeypatch.setattr("conservtl.runtime.per_example._MOST", 3)  # chunks of 3, 3 and 1
    torch.manual_seed(0)
    model = MODELS[name]().double().eval()
    weights = torch.linspace(0.1, 1.0, 7, dtype=torch.float64)
    found = PerExample(model, named_parameters(model), value).squares((X, Y), weights if weighted else None)
    expected = plain(model, X, Y, weights if weighted else torch.ones(7))
    assert found.keys() == expected.keys()
    for key, square in found.items():
        torch.testing.assert_close(square, expected[key], rtol=1e-9, atol=1e-14)
    assert all(p.grad is None for p in model.parameters())


def test_batches_of_any_make():
    """Mappings, scalars beside tensors, tied weights, and unused parameters."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(6, 4)
            self.out = nn.Linear(4, 6, bias=False)
            self.out.weight = self.embed.weight
            self.idle = nn.Linear(2, 2)

        def forward(self, ids, scale):
            return self.out(self.embed(ids).mean(1)) * scale

    torch.manual_seed(0)
    model = Tied().double().eval()
    ids = torch.randint(6, (5, 3))

    def loss(model, batch):
        return F.cross_entropy(model(batch["in"]["ids"], batch["in"]["scale"]), batch["labels"])

    batch = {"in": {"ids": ids, "scale": torch.tensor(2.0)}, "labels": ids[:, 0], "note": "five"}
    found = PerExample(model, named_parameters(model), loss).squares(batch)
    expected = torch.zeros_like(model.embed.weight)
    for i in range(5):
        (gradient,) = torch.autograd.grad(
            F.cross_entropy(model(ids[i : i + 1], 2.0), ids[i : i + 1, 0]), model.embed.weight
        )
        expected += gradient**2
    torch.testing.assert_close(found["embed.weight"], expected)
    assert not found["idle.weight"].any()


def test_what_is_wrong_without_vmap_too_says_so_itself():
    model = nn.Linear(3, 2).double()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        PerExample(model, named_parameters(model), value).squares((torch.zeros(4, 5, dtype=torch.float64), Y[:4]))


def test_a_batch_that_cannot_be_taken_apart():
    """Targets of all examples in one row, as for CTC, need batches of one example."""
    model = nn.Linear(3, 2).double()
    examples = PerExample(model, named_parameters(model), lambda m, batch: m(batch[0]).sum() * batch[1].sum())
    with pytest.raises(ctl.SpecError, match=r"received lengths \[4, 9\]\. Give batches of one example"):
        examples.squares((torch.zeros(4, 3, dtype=torch.float64), torch.ones(9)))
    found = examples.squares((torch.ones(1, 3, dtype=torch.float64), torch.ones(9)))
    torch.testing.assert_close(found["weight"], torch.full((2, 3), 81.0, dtype=torch.float64))


@pytest.mark.parametrize(("limit", "chunk"), [(1 << 26, 64), (24, 2), (23, 1), (5, 1)])
def test_how_many_examples_at_a_time(limit, chunk, monkeypatch):
    """Of 12 elements each: as many as the limit holds, and one in any case."""
    monkeypatch.setattr("conservtl.runtime.per_example._ELEMENTS", limit)
    model = nn.Linear(3, 3)
    squares = PerExample(model, named_parameters(model), value)
    assert (squares._chunk, squares._batched) == (chunk, chunk > 1)


@pytest.mark.parametrize("cuda", [True, False])
@pytest.mark.parametrize("body", [nn.GRU(3, 3), nn.Linear(3, 3)])
def test_recurrent_layers_do_without_cudnn_on_a_gpu(body, cuda, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    kernels = PerExample(body, named_parameters(body), value)._kernels()
    assert isinstance(kernels, nullcontext) == (not cuda or isinstance(body, nn.Linear))
