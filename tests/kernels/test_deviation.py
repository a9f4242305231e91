"""Moving toward the source: exact at both ends, and the norms that say how far."""

from __future__ import annotations

import pytest
import torch

from conservtl.kernels.deviation import move_toward, norms


def test_an_amount_of_one_is_the_source_and_of_zero_the_weight_bit_for_bit():
    """w - (w - w0) would be off by rounding where the two differ in size."""
    weight, anchor = torch.tensor([1e-3, 1.0, 3.0]), torch.tensor([1e-9, 3.0, 1e7])
    kept, gone = weight.clone(), weight.clone()
    move_toward([kept, gone], [anchor, anchor], [torch.tensor(0.0), torch.tensor(1.0)])
    assert torch.equal(kept, weight)
    assert torch.equal(gone, anchor)


def test_an_amount_for_each_row():
    weight = torch.ones(2, 3)
    move_toward([weight], [torch.zeros(2, 3)], [torch.tensor([[0.25], [1.0]])])
    assert weight.tolist() == [[0.75] * 3, [0.0] * 3]


@pytest.mark.parametrize(
    ("by", "norm", "expected"),
    [
        ("tensor", "frobenius", (1 + 4 + 9 + 16) ** 0.5),
        ("tensor", "mars", 7.0),
        ("row", "frobenius", [[5**0.5], [5.0]]),
        ("row", "mars", [[3.0], [7.0]]),
    ],
)
def test_norms_by_hand(by, norm, expected):
    (found,) = norms([torch.tensor([[1.0, -2.0], [3.0, -4.0]])], by, norm)
    torch.testing.assert_close(found, torch.tensor(expected))


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4, 5)])
@pytest.mark.parametrize("norm", ["frobenius", "mars"])
def test_a_row_broadcasts_to_its_tensor_whatever_the_shape(shape, norm):
    tensor = torch.ones(shape)
    (rows,) = norms([tensor], "row", norm)
    assert (tensor / rows).shape == tensor.shape
    assert rows.numel() == (shape[0] if shape else 1)


def test_nothing_to_move():
    move_toward([], [], [])
    assert norms([]) == []


def test_a_part_without_rows_has_a_norm_of_zero():
    """Where a tensor has fewer rows than there are processes, one of them holds none."""
    assert norms([torch.empty(0, 3)], norm="mars") == [torch.zeros(())]
