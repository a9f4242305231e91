"""Batches of every supported kind of data, and the errors for others."""

from __future__ import annotations

import weakref
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import conservtl as ctl
from conservtl.data import Examples
from conservtl.engine.batch import Batch, Cut
from conservtl.engine.batching import as_batches
from conservtl.engine.divergence import Losses
from conservtl.engine.held import Held
from conservtl.engine.processes import Processes
from conservtl.engine.snapshot import State
from conservtl.engine.streamed import Streamed

CPU = torch.device("cpu")


class Pairs(Dataset):
    def __init__(self, inputs, labels):
        self.inputs, self.labels = inputs, labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.inputs[index], self.labels[index]


class Stream(IterableDataset):
    def __init__(self, inputs, labels):
        self.inputs, self.labels = inputs, labels

    def __iter__(self):
        return iter(zip(self.inputs, self.labels, strict=True))


FORMS = {
    "examples": (lambda x, y: Examples(x, y, tuple(map(str, y))), Held),
    "tuple": (lambda x, y: (x, y), Held),
    "list": (lambda x, y: [x, y], Held),
    "dictionary": (lambda x, y: {"inputs": x, "labels": y}, Held),
    "tensor dataset": (TensorDataset, Held),
    "dataset": (Pairs, Streamed),
    "iterable dataset": (Stream, Streamed),
    "loader": (lambda x, y: DataLoader(Pairs(x, y), 4), Streamed),
    "batches": (lambda x, y: [(x[:7], y[:7]), (x[7:], y[7:])], Streamed),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shuffle", [False, True])
def test_every_example_comes_once(form, shuffle):
    """An epoch has each example once, whatever the kind of data; without shuffling in the data's order."""
    inputs, labels = torch.arange(11.0)[:, None], torch.arange(11)
    make, kind = FORMS[form]
    batches = as_batches(make(inputs, labels), 4, CPU, shuffle=shuffle)
    assert isinstance(batches, kind)
    found = list(batches.epoch())
    contents = [b.content.values() if isinstance(b.content, dict) else b.content for b in found]
    seen = torch.cat([labels for _, labels in contents]).tolist()
    assert (sorted(seen) if shuffle else seen) == list(range(11))
    assert all(torch.equal(x[:, 0].long(), y) for x, y in contents)
    assert [b.size for b in found] == [len(y) for _, y in contents]
    assert batches.count() in {None, len(found)}


@settings(deadline=None)  # the time of an example is the machine's
@given(length=st.integers(1, 40), size=st.integers(1, 10), world=st.integers(1, 3))
def test_batches_of_held_data(length, size, world):
    """A last batch of one example joins the batch before; the parts of processes are those of one process's batches."""
    batches = Held((torch.arange(length),), size, CPU, shuffle=False)
    sizes = [b.size for b in batches.epoch()]
    assert sum(sizes) == length
    assert len(sizes) == batches.count()
    if length > 1 and size > 1:
        assert min(sizes) > 1
    assert max(sizes) <= size + 1
    for generator in (None, torch.Generator().manual_seed(1)):
        parts = []
        for rank in range(world):
            cut = Cut(size, generator is not None, Processes(rank, world), generator and generator.manual_seed(1))
            parts.append(list(Held((torch.arange(length),), cut, CPU).epoch()))
        for number, together in enumerate(zip(*parts, strict=True)):
            assert all(len(batch.content[0]) > 0 for batch in together)
            found = [batch.content[0][: batch.size] for batch in together]
            assert sum(map(len, found)) == sizes[number]  # no example twice, none left out
            assert sum(batch.share for batch in together) / world == pytest.approx(1)
            assert sum(batch.weight for batch in together) == pytest.approx(sizes[number])
            if generator is None:
                rows = torch.cat(found).sort().values
                assert rows.tolist() == list(range(sum(sizes[:number]), sum(sizes[: number + 1])))


@pytest.mark.parametrize("form", ["tuple", "dataset"])
def test_a_remainder_of_one_trains(plain, data, form):
    """17 examples in batches of 16 and a batch norm that cannot train on one."""
    make, _ = FORMS[form]
    adaptation = plain()
    adaptation.model.head = torch.nn.Sequential(torch.nn.BatchNorm1d(8), adaptation.model.head)
    adaptation = ctl.adapt(adaptation.model, adaptation.model.state_dict())
    result = ctl.fit(adaptation, make(data[0][:17], data[1][:17]), training=ctl.Training(epochs=2, batch_size=16))
    assert result.steps == 2


def test_skipping_leaves_the_rest(data):
    """The order is drawn at the call, so that a resumed epoch skips the batches already done."""
    for source in (data, Pairs(*data)):
        batches = as_batches(source, 16, CPU, shuffle=True)
        torch.manual_seed(1)
        whole = [b.content[1] for b in batches.epoch()]
        torch.manual_seed(1)
        rest = [b.content[1] for b in batches.epoch(skip=2)]
        assert all(torch.equal(a, b) for a, b in zip(whole[2:], rest, strict=True))


def test_workers(plain, data):
    loader = DataLoader(Pairs(*data), 16, shuffle=True, num_workers=1)
    assert ctl.fit(plain(), loader, training=ctl.Training(epochs=1)).steps == 4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: (torch.zeros(3, 2), torch.zeros(4)), r"one common length above 0; received lengths \[3, 4\]"),
        (lambda: (torch.zeros(0, 2), torch.zeros(0)), r"received lengths \[0, 0\]"),
        (lambda: (torch.zeros(3, 2), torch.tensor(1)), r"received lengths \[3, 0\]"),
        (lambda: {"inputs": torch.zeros(3), "text": ["a"]}, "a dictionary must hold tensors.*'text': 'list'"),
        (dict, "a dictionary must hold tensors"),
        (lambda: Pairs([], []), "the dataset has no examples"),
        (lambda: iter([(torch.zeros(2, 3, 12), torch.zeros(2))]), "can be iterated repeatedly"),
        (lambda: 3, "received int"),
        (lambda: "recordings", "received str"),
        (lambda: None, "received NoneType"),
        (list, "the data gave no batches"),
    ],
)
def test_data_errors(plain, make, message):
    """Each message says what was received and what to pass."""
    with pytest.raises(ctl.DataError, match=message):
        ctl.fit(plain(), make(), training=ctl.Training(epochs=1))


class Recorded:
    """Batch class that counts how many of its instances are on the device at once."""

    alive: ClassVar[weakref.WeakSet] = weakref.WeakSet()
    most: ClassVar[int] = 0

    def __init__(self, inputs, labels):
        self.inputs, self.labels = inputs, labels

    def to(self, device, non_blocking=False):
        moved = Recorded(self.inputs.to(device), self.labels.to(device))
        Recorded.alive.add(moved)
        Recorded.most = max(Recorded.most, len(Recorded.alive))
        return moved


class Unsized:
    """Batches without a length."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


@pytest.mark.parametrize("make", [list, Unsized], ids=["with a length", "without one"])
def test_one_batch_at_a_time_is_on_the_device(plain, data, make):
    """While a group is accumulated; its mean is right in the smaller last group too."""
    Recorded.most = 0
    batches = make([Recorded(x, y) for x, y in zip(data[0].split(10), data[1].split(10), strict=True)])
    ours, theirs = plain(), plain()
    options = {
        "forward": lambda model, batch: model(batch.inputs),
        "loss": lambda outputs, batch: F.cross_entropy(outputs, batch.labels),
    }
    training = ctl.Training(epochs=2, accumulate=3, lr=0.01)
    assert ctl.fit(ours, batches, training=training, seed=0, **options).steps == 4
    assert Recorded.most == 1
    optimizer = theirs.optimizer(torch.optim.AdamW, lr=0.01)
    torch.manual_seed(0)
    theirs.model.train()
    for group in ([0, 1, 2], [3, 4]) * 2:
        for number in group:
            rows = slice(10 * number, 10 * number + 10)
            (F.cross_entropy(theirs.model(data[0][rows]), data[1][rows]) / len(group)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(ours.model.parameters(), theirs.model.parameters(), strict=True))


def test_one_batch_of_held_data_is_taken_at_a_time(plain, data, monkeypatch):
    alive, most = weakref.WeakSet(), []
    take = Held.take

    def recorded(self, index):
        content = take(self, index)
        alive.add(content[0])
        most.append(len(alive))
        return content

    monkeypatch.setattr(Held, "take", recorded)
    ctl.fit(plain(), data, training=ctl.Training(epochs=1, batch_size=10, accumulate=5), keep_frozen_outputs=False)
    assert most == [1] * 5


def test_losses_that_wait_for_the_device_do_not_hold_batches():
    """On a GPU the losses of 50 batches are read together."""
    losses, inputs = Losses(State(), torch.device("cuda")), torch.ones(4, 3)
    batch = Batch((inputs,), 4, torch.arange(4))
    left = weakref.ref(inputs)
    losses.add(torch.tensor(2.0), batch, 1, 1)
    del batch, inputs
    assert left() is None
    losses.look()
    assert (losses.state.total, losses.state.seen) == (8.0, 4)
