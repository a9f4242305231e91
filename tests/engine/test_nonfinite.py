"""Parts of a batch, of any form, that are not finite, with their examples."""

import dataclasses

import pytest
import torch

from conservtl.engine.divergence import finite_rows, where_not_finite

NAN = float("nan")
ROWS = torch.tensor([[1.0, 2.0], [NAN, 0.0], [1.0, NAN]])


@dataclasses.dataclass
class Batch:
    inputs: torch.Tensor
    labels: torch.Tensor


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (ROWS, "batch in examples 1, 2"),
        ((ROWS, torch.tensor([0, 1, 1])), "batch[0] in examples 1, 2"),
        ({"x": ROWS[:2], "scale": torch.tensor(NAN)}, "batch['x'] in example 1 and batch['scale']"),
        (Batch(ROWS[1:], torch.tensor([0, 1])), "batch.inputs in examples 0, 1"),
        ((ROWS[:1], torch.tensor([0])), None),
    ],
)
def test_parts_and_examples_are_named(content, said):
    assert where_not_finite(finite_rows(content)) == said


def test_examples_are_named_by_their_place_and_their_files():
    rows, index = finite_rows((ROWS, torch.zeros(3))), torch.tensor([7, 5, 6])
    assert where_not_finite(rows, index, ["a.wav", "b.wav"]) == "batch[0] in examples 5 (b.wav), 6"
