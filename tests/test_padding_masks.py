"""Masks of tensors whose first axis is not that of examples, of pooled positions, and of lengths that do not fit."""

import collections

import pytest
import torch

import conservtl as ctl
from conservtl.functions import classes_of
from conservtl.padding.finding import find_padding
from conservtl.padding.positions import Padding
from conservtl.runtime.padding_watch import _arguments

LENGTHS = torch.tensor([3, 2])


def test_packed_positions_hold_no_padding():
    assert Padding(LENGTHS).mask((5, 4), 1, "x") is None


@pytest.mark.parametrize("valid", [None, torch.ones(2, 4, dtype=torch.bool)], ids=["lengths", "mask"])
def test_a_tensor_without_examples_beside_inputs_without_padding(valid):
    """Six rows of two examples with four positions each: three a row are no part of four."""
    assert Padding(torch.tensor([4, 4]), (4,), valid).mask((6, 8), 1, "x") is None


def test_such_a_tensor_beside_inputs_with_padding_is_refused():
    with pytest.raises(ctl.SpecError, match=r"x: lengths or mask must have one row for each example; received 2 for"):
        Padding(LENGTHS, (4,)).mask((6, 8), 1, "x")


@pytest.mark.parametrize("lengths", [[7, 2], [0, 2]])
def test_lengths_beyond_the_positions_are_refused(lengths):
    with pytest.raises(ctl.SpecError, match=rf"from 1 to the number of positions, 4; received {min(lengths)} to"):
        Padding(torch.tensor(lengths)).mask((2, 4, 8), 2, "x")


def test_pooled_positions_count_if_one_of_them_does():
    valid = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]).bool()
    mask = Padding(valid.sum(1), (4,), valid).mask((2, 2, 8), 2, "x")
    assert mask.tolist() == [[True, True], [True, False]]


def test_a_decoders_padding_alone_leaves_all_of_the_encoder():
    found = find_padding(
        {"decoder_input_ids": torch.ones(2, 3), "decoder_attention_mask": torch.tensor([[1, 1, 0]] * 2)}
    )
    assert found.lengths.tolist() == [1.0, 1.0]
    assert found.of_outputs().lengths.tolist() == [2, 2]


def test_lengths_without_inputs_say_nothing():
    assert find_padding({"lengths": LENGTHS}) is None


@pytest.mark.parametrize(("shares", "expected"), [([0.75, 0.5], [3, 2]), ([0.7, 0.3], [0.7, 0.3])])
def test_shares_are_counts_where_they_are_exact_ones(shares, expected):
    found = find_padding({"inputs": torch.zeros(2, 4), "lengths": torch.tensor(shares)})
    assert found.lengths.tolist() == pytest.approx(expected)


def test_arguments_in_a_named_tuple_or_a_dictionary_count_by_their_names():
    batch = collections.namedtuple("Batch", ["inputs", "lengths"])(1, 2)  # noqa: PYI024 - as users write them
    assert _arguments(("x", "y"), (batch, {"mask": 3}), {"z": 4}) == {"inputs": 1, "lengths": 2, "mask": 3, "z": 4}


@pytest.mark.parametrize(
    ("labels", "message"),
    [([0, 1], "must be a tensor of classes; received list"), (torch.zeros(2, dtype=torch.complex64), "whole numbers")],
)
def test_labels_that_are_no_classes(labels, message):
    with pytest.raises(ctl.SpecError, match=message):
        classes_of(torch.zeros(2, 3), (None, labels))
