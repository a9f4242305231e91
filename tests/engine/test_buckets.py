"""Batches by length: bounded in seconds, little padding, every sequence once an epoch."""

from __future__ import annotations

import pytest
import torch

import conservtl as ctl
from conservtl.data import Sequences, first_batch, join, renumber, spread
from conservtl.engine.batching import as_batches
from conservtl.engine.buckets import BucketedBatches, cut_buckets

CPU = torch.device("cpu")

# Share of LibriSpeech's utterances by whole seconds, as its published histogram has it: a hump of 1 to 10 s and most
# between 12 and 16 s.
LIBRISPEECH = [1, 3, 4, 5, 5, 5, 5, 4, 4, 4, 5, 7, 12, 17, 15, 4]


def data_of(seconds, rate=10):
    lengths = [max(1, round(rate * one)) for one in seconds]
    return Sequences(
        tuple(torch.full((length, 2), float(number + 1)) for number, length in enumerate(lengths)),
        tuple(torch.tensor([number]) for number in range(len(lengths))),
        tuple(map(str, range(len(lengths)))),
        (),
        tuple(seconds),
    )


def librispeech(count):
    generator = torch.Generator().manual_seed(0)
    bins = torch.multinomial(torch.tensor(LIBRISPEECH, dtype=torch.float), count, True, generator=generator)
    return (1 + bins + torch.rand(count, generator=generator)).tolist()


def test_each_sequence_is_in_one_batch_of_an_epoch_and_orders_differ():
    data = data_of(librispeech(300))
    batches = BucketedBatches(data, 64, 60.0, shuffle=True)
    torch.manual_seed(0)
    first, second = ([batch["names"] for batch in batches] for _ in range(2))
    for epoch in (first, second):
        assert sorted(int(name) for names in epoch for name in names) == list(range(300))
        assert len(epoch) == len(batches)
    assert first != second


def test_padding_stays_below_a_tenth_on_the_lengths_of_librispeech_and_no_batch_exceeds_its_seconds():
    data = data_of(librispeech(2000), rate=100)
    padded = real = 0
    for batch in BucketedBatches(data, 1000, 100.0, shuffle=True):
        longest = int(batch["lengths"].max())
        assert longest * len(batch["lengths"]) <= 10_000 + len(batch["lengths"])  # a rounding each
        padded += longest * len(batch["lengths"])
        real += int(batch["lengths"].sum())
    assert 1 - real / padded < 0.1


def test_padding_is_zero_and_labels_are_ignored_there():
    """By hand: rows of 3 and 1 positions."""
    data = data_of([0.3, 0.1])
    batch = data.batch([0, 1])
    assert batch["inputs"][:, :, 0].tolist() == [[1, 1, 1], [2, 0, 0]]
    assert batch["lengths"].tolist() == [3, 1]
    data = Sequences(data.inputs, (torch.tensor([4, 5]), torch.tensor([6])), data.names, ("a", "b"), data.seconds)
    assert data.batch([0, 1])["labels"].tolist() == [[4, 5], [6, -100]]
    assert data.take([1]).groups == ("b",)


def test_buckets_by_hand():
    """Seconds 1, 1, 1, 10, 10: three of 1 s fit 4 s, and each of 10 s is a batch alone."""
    assert cut_buckets([1, 10, 1, 10, 1], 3, 4.0) == [([0, 2, 4], 1), ([1, 3], 2)]
    assert cut_buckets([1, 10, 1], 64, None) == [([0, 2, 1], 1)]


def test_processes_get_as_many_batches_each(monkeypatch):
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", lambda *_: None)
    data = data_of(librispeech(50))
    parts = [list(BucketedBatches(data, 4, None, shuffle=False, part=(rank, 2))) for rank in range(2)]
    assert len(parts[0]) == len(parts[1])
    assert {name for part in parts for batch in part for name in batch["names"]} == set(map(str, range(50)))


def test_fit_takes_them_and_a_resumed_order_is_the_same():
    data = data_of(librispeech(20))
    held = as_batches(data, 4, CPU, shuffle=True)
    torch.manual_seed(3)
    whole = [batch.content["names"] for batch in held.epoch()]
    torch.manual_seed(3)
    assert [batch.content["names"] for batch in held.epoch(skip=2)] == whole[2:]
    assert held.count() == len(whole)


def test_the_other_tools_for_data_take_them():
    data = data_of([0.1, 0.2, 0.3, 0.4])
    assert spread(data, 2).names == ("0", "2")
    assert first_batch(data, 2)["lengths"].tolist() == [1, 2]
    assert join([data.take([0]), data.take([3])]).batch([1])["lengths"].tolist() == [4]
    assert [one.tolist() for one in renumber(data, [3, 2, 1, 0]).labels] == [[3], [2], [1], [0]]
    with pytest.raises(ctl.DataError, match="4 inputs, 4 labels, 3 names"):
        Sequences(data.inputs, data.labels, data.names[:3], (), data.seconds)
    with pytest.raises(ctl.DataError, match="join their like alone"):
        join([data, (torch.zeros(1), torch.zeros(1))])
