"""Batches of any nesting: their tensors are listed, replaced, moved and counted."""

from collections import OrderedDict, UserDict
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from conservtl.batches import batch_size, check_batches, map_tensors, replace_tensors, row_count, tensors_of, to_device
from conservtl.errors import DataError, SpecError


class Pair(NamedTuple):
    inputs: torch.Tensor
    labels: torch.Tensor


class Row(tuple):
    """A tuple that torch's pytree does not know."""

    __slots__ = ()


@dataclass(frozen=True)
class Spoken:
    inputs: torch.Tensor
    words: list[str]
    count: int = field(init=False, default=7)


X, Y = torch.arange(6.0).reshape(3, 2), torch.tensor([0, 1, 2])
NESTED = {
    "tensor": (X, [X]),
    "tuple": ((X, Y), [X, Y]),
    "list": ([X, Y], [X, Y]),
    "named tuple": (Pair(X, Y), [X, Y]),
    "dictionary": ({"labels": Y, "inputs": X}, [Y, X]),
    "ordered dictionary": (OrderedDict(inputs=X, labels=Y), [X, Y]),
    "dataclass": (Spoken(X, ["a", "b", "c"]), [X]),
    "subclass of tuple": (Row((X, Y)), [X, Y]),
    "below others": ([{"a": (X, None, "text"), "b": Row([Pair(Y, Spoken(X, []))])}, 3], [X, Y, X]),
    "no tensors": ({"words": ["a", "b"], "speaker": "c"}, []),
}


@pytest.mark.parametrize(("batch", "tensors"), NESTED.values(), ids=NESTED)
def test_tensors_are_found_in_order_and_replaced(batch, tensors):
    found = tensors_of(batch)
    assert [id(tensor) for tensor in found] == [id(tensor) for tensor in tensors]
    copies = [tensor + 10 for tensor in tensors]
    replaced = replace_tensors(batch, copies)
    assert type(replaced) is type(batch)
    assert [id(tensor) for tensor in tensors_of(replaced)] == [id(tensor) for tensor in copies]
    assert [id(tensor) for tensor in tensors_of(batch)] == [id(tensor) for tensor in tensors]  # left as it was


def test_everything_but_tensors_is_kept():
    mapped = map_tensors({"a": ["text", b"bytes", None, 3], "b": Spoken(X, ["a"])}, lambda tensor: tensor * 2)
    assert mapped["a"] == ["text", b"bytes", None, 3]
    assert mapped["b"].words == ["a"]
    assert mapped["b"].count == 7
    assert torch.equal(mapped["b"].inputs, X * 2)


@pytest.mark.parametrize("kind", [UserDict, MappingProxyType])
def test_another_mapping_becomes_a_dictionary(kind):
    mapped = map_tensors(kind({"inputs": X, "more": kind({"labels": Y})}), torch.neg)
    assert type(mapped) is dict
    assert type(mapped["more"]) is dict
    assert torch.equal(mapped["more"]["labels"], -Y)


class Encoding(UserDict):
    """Moves itself, as a tokenizer's encoding does."""

    def to(self, device, *, non_blocking):
        assert non_blocking
        return Encoding({key: value.to(device) for key, value in self.items()})


@pytest.mark.parametrize(("batch", "tensors"), NESTED.values(), ids=NESTED)
def test_to_device_moves_every_tensor(batch, tensors):
    moved = to_device(batch, torch.device("meta"))
    assert type(moved) is type(batch)
    assert [tensor.shape for tensor in tensors_of(moved)] == [tensor.shape for tensor in tensors]
    assert all(tensor.is_meta for tensor in tensors_of(moved))


def test_an_object_with_to_moves_itself():
    moved = to_device({"text": Encoding(ids=X), "labels": Y}, torch.device("meta"))
    assert isinstance(moved["text"], Encoding)
    assert moved["text"]["ids"].is_meta
    assert moved["labels"].is_meta


def test_a_packed_sequence_stays_one():
    packed = pack_sequence([torch.ones(3, 2), torch.ones(2, 2)])
    moved, labels = to_device((packed, Y), torch.device("cpu"))
    doubled = map_tensors(packed, lambda tensor: tensor * 2)
    assert isinstance(moved, PackedSequence)
    assert isinstance(doubled, PackedSequence)
    assert torch.equal(doubled.data, torch.full((5, 2), 2.0))
    assert torch.equal(labels, Y)


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        (X, 3),
        ((X, Y), 3),
        ({"names": ["a"], "inputs": X}, 3),
        ([], 1),
        (torch.tensor(1.0), 1),
        ((torch.tensor(1.0), X), 3),
        ("text", 1),
        ((torch.zeros(0, 2), Y), 0),
        ((pack_sequence([torch.ones(3, 2), torch.ones(2, 2)]), torch.zeros(2)), 2),
    ],
)
def test_batch_size_is_the_length_of_the_first_tensor_with_dimensions(batch, size):
    assert batch_size(batch) == size


@pytest.mark.parametrize(
    ("batch", "count"), [((X, Y), 3), ({"inputs": X, "scale": torch.tensor(2.0)}, 3), ((X[:1], Y), 1)]
)
def test_row_count(batch, count):
    assert row_count(batch) == count


@pytest.mark.parametrize("batch", [(X, Y[:2]), torch.tensor(1.0), []])
def test_row_count_refuses_a_batch_without_rows(batch):
    with pytest.raises(SpecError, match="one row for each example"):
        row_count(batch)


@pytest.mark.parametrize("batches", [X, (X, Y), {"inputs": X}, iter([(X, Y)]), (b for b in [X])])
def test_batches_must_be_iterable_repeatedly(batches):
    with pytest.raises(DataError, match="can be iterated repeatedly"):
        check_batches(batches, "measure")


@pytest.mark.parametrize("batches", [[X], [(X, Y)], ((X, Y), (X, Y)), torch.utils.data.DataLoader([X, X])])
def test_collections_of_batches_pass(batches):
    check_batches(batches, "measure")
