"""Forms of data that studies take, and the digest by which they find the runs of the same data and functions again."""

import copy
import functools
import json
import math

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import conservtl as ctl
from conservtl.data import Examples
from conservtl.experiments.own.data import as_data, as_held_out, class_numbers
from conservtl.experiments.own.fingerprint import _Digest

X, Y = torch.arange(6.0).view(3, 2), torch.tensor([2, 0, 1])


class Pairs(Dataset):
    """Examples that are read one by one."""

    def __init__(self, row=tuple):
        self.row = row

    def __len__(self):
        return 3

    def __getitem__(self, place):
        return self.row((X[place], Y[place]))


class Targets(Pairs):
    """The same with a list of targets, which must not be read one by one."""

    targets = Y.numpy()

    def __getitem__(self, place):
        raise AssertionError("read")


class Endless(IterableDataset):
    def __iter__(self):
        return iter([])


@pytest.mark.parametrize(
    "value", [{}, {"x": X, "note": "text"}, {"x": torch.tensor(1.0)}, [X, "text"], ("a", "b"), (), X, "text", 7]
)
def test_other_forms_are_refused_by_their_type(value):
    with pytest.raises(ctl.DataError, match=rf"^train must be a tuple .*received {type(value).__name__}\.$"):
        as_data(value, "train")


def test_parts_of_tensors_are_rows():
    rows = as_data(({"ids": X, "mask": X > 2}, Y), "train")
    assert len(rows) == 3
    inputs, label = rows[1]
    assert (inputs["ids"].tolist(), inputs["mask"].tolist(), int(label)) == ([2.0, 3.0], [False, True], 0)


def test_a_loader_is_held_out_as_it_is_unless_it_has_no_end():
    loader = DataLoader(TensorDataset(X, Y), 2)
    assert as_held_out(loader, "held_out") is loader
    with pytest.raises(ctl.DataError, match="which a DataLoader does not allow"):
        as_held_out(DataLoader(Endless()), "held_out")


@pytest.mark.parametrize(
    "data",
    [Examples(X, Y, ("a", "b", "c")), Pairs(), Pairs(lambda pair: {"x": pair[0], "labels": pair[1]}), Targets()],
    ids=["examples", "pairs", "dictionaries", "targets"],
)
def test_classes_of_each_form(data):
    assert class_numbers(data, classes=True) == [2, 0, 1]
    assert class_numbers(data, classes=False) == [0, 0, 0]


class Holder:
    def __init__(self, value):
        self.value = value

    def get(self):
        return self.value


def digest(value):
    made = _Digest()
    made.add(value)
    return made.text()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (np.arange(3), np.arange(3.0)),
        (np.array(["a", None], dtype=object), np.arange(2)),
        (math, json),
        ({"a", "b"}, {"a", "c"}),
        (functools.partial(int, base=2), functools.partial(int, base=8)),
        (Holder(1).get, Holder(2).get),
        (torch.eye(2).to_sparse(), torch.ones(2, 2)),
    ],
)
def test_the_digest_tells_contents_apart(one, other):
    assert digest(one) == digest(one if one is math else copy.deepcopy(one)) != digest(other)


def test_a_loader_counts_by_its_dataset_and_a_dataset_by_its_rows():
    def of(data):
        made = _Digest()
        made.add_data(data)
        return made.text()

    assert of(DataLoader(Pairs(), 2)) == of(Pairs()) != of(Pairs(list))
    assert of(DataLoader(TensorDataset(X, Y))) == of(TensorDataset(X, Y)) != of(TensorDataset(X, 1 - Y))
