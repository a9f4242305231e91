"""Features, channels and labels in the outputs of modules, by shapes at the borders of the rules."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import conservtl as ctl
from conservtl.runtime.layer_features import Channels, all_tensors_of, output_size
from conservtl.runtime.source_model import CommonLabels
from conservtl.runtime.task_loss import _name, _positions, _signed, read_task_loss


@pytest.mark.parametrize(
    ("first", "part", "alike"),
    [
        ((2, 3), (2, 3), True),
        ((2,), (2,), False),  # a length each
        ((2, 3), (1, 3), False),  # other examples
        ((2, 5, 8), (2, 7, 8), True),
        ((2, 5, 8), (2, 5, 4), False),
        ((2, 5, 8), (2, 8), False),
        ((2, 8, 4, 4), (2, 8, 2, 2), True),
        ((2, 4, 4, 8), (2, 2, 2, 8), True),
        ((2, 8, 4, 4), (2, 6, 2, 2), False),
        ((2, 8, 4, 4), (2, 6, 4, 2), False),
    ],
)
def test_parts_of_a_tuple_with_the_examples_and_channels_of_the_first(first, part, alike):
    found = all_tensors_of((torch.zeros(first), torch.zeros(part)), "layer")
    assert len(found) == 1 + alike
    assert len(all_tensors_of((torch.zeros(first), torch.zeros(part, dtype=torch.long)), "layer")) == 1


def test_a_list_in_a_tuple_has_no_further_parts():
    maps = [torch.zeros(2, 3, 4), torch.zeros(2, 3, 2)]
    assert len(all_tensors_of((maps, torch.zeros(2, 3, 4)), "layer")) == 2
    assert len(all_tensors_of((maps[:1], torch.zeros(2, 3, 4)), "layer")) == 2


class Declares(nn.Module):
    """A module with given attributes."""

    def __init__(self, **attributes):
        super().__init__()
        for name, value in attributes.items():
            setattr(self, name, value)


@pytest.mark.parametrize(
    ("module", "size"),
    [
        (nn.LSTM(3, 4), 4),
        (nn.LSTM(3, 4, bidirectional=True), 8),
        (nn.LSTM(3, 4, bidirectional=True, proj_size=2), 4),
        (nn.LayerNorm((5, 7)), 7),
        (nn.Embedding(9, 4), 4),
        (nn.ReLU(), None),
        (Declares(out_features=True), None),
        (Declares(normalized_shape=()), None),
        (Declares(gain=nn.Parameter(torch.ones(6)), shift=nn.Parameter(torch.ones(6))), 6),
        (Declares(gain=nn.Parameter(torch.ones(6)), weight=nn.Parameter(torch.ones(2, 6))), None),
    ],
)
def test_declared_channels(module, size):
    assert output_size(module) == size


def test_a_permutation_of_other_dimensions_moves_nothing():
    """A block of equal sizes ends with a convolution; a module with ``dims`` of three axes follows."""
    block = nn.Sequential(nn.Conv2d(4, 4, 1), Declares(dims=(0, 2, 1)))
    assert Channels(block).axis(torch.empty(4, 4, 4, 4)) == 1
    assert Channels(nn.Sequential(block[0], Declares(dims=(0, 2, 3, 1)))).axis(torch.empty(4, 4, 4, 4)) == 3


@pytest.mark.parametrize(
    ("shape", "axis", "found"),
    [
        ((2, 3), None, 1),
        ((2, 3, 3), None, 2),
        ((2, 3, 5), None, 1),
        ((2, 3, 3), 1, 1),
        ((2, 3, 3, 3), None, 1),
        ((2, 3, 3, 3), 3, 3),
        ((2, 5, 3, 5), None, 2),
        ((2, 3, 3, 3, 3), None, 1),
    ],
)
def test_the_axis_of_labels_in_common(shape, axis, found):
    """Of three labels the source has the first as its third and the last as its first."""
    adapted = torch.arange(torch.Size(shape).numel()).view(shape)
    source = -torch.ones(adapted.movedim(found, 0)[:1].expand(4, *[-1] * (len(shape) - 1)).movedim(0, found).shape)
    ours, theirs = CommonLabels((2, None, 0)).of(adapted, source, axis)
    assert torch.equal(ours, adapted.movedim(found, 0)[[0, 2]].movedim(0, found))
    assert theirs.shape == ours.shape


@pytest.mark.parametrize(("adapted", "source"), [((2, 3), (2, 3, 1)), ((2, 3, 4), (2, 3, 5)), ((3, 2), (3, 2))])
def test_labels_in_common_need_one_axis_that_differs(adapted, source):
    with pytest.raises(ctl.SpecError, match="one axis of 3 labels"):
        CommonLabels((1, None, 0)).of(torch.zeros(adapted), torch.zeros(source))


@pytest.mark.parametrize(
    ("shape", "axis", "positions"),
    [
        ((), None, ()),
        ((4,), None, (4,)),  # a logit for each example: no axis is of classes
        ((4, 3), None, (4,)),
        ((4, 3), 0, (3,)),
        ((4, 5, 3), None, (4, 5)),
        ((4, 3, 5, 6), None, (4, 5, 6)),
        ((4, 3, 5, 6), 3, (4, 3, 5)),
    ],
)
def test_positions_of_outputs(shape, axis, positions):
    assert _positions(torch.zeros(shape), axis) == torch.Size(positions)


@pytest.mark.parametrize(
    ("given", "number"),
    [(5, 5), (0, 0), (2**63 - 1, 2**63 - 1), (2**63, -(2**63)), (2**64 - 1, -1), (2**64 - 100, -100), (-1, -1)],
)
def test_numbers_that_torch_gives_without_their_sign(given, number):
    assert _signed(given) == number


@pytest.mark.parametrize(
    ("loss", "name"),
    [
        (lambda x: nn.functional.nll_loss(x, torch.zeros(4, 5, 5, dtype=torch.long)), "NllLoss"),
        (lambda x: nn.functional.nll_loss(x[..., 0, 0], torch.zeros(4, dtype=torch.long)), "NllLoss"),
        (lambda x: x.log_softmax(1), "LogSoftmax"),
        (lambda x: x.abs(), "Abs"),
    ],
)
def test_names_of_operations(loss, name):
    assert _name(loss(torch.zeros(4, 3, 5, 5, requires_grad=True)).grad_fn) == name


def test_a_loss_of_other_outputs_says_its_form_and_no_axis():
    """Of another forward pass: which of the axes it took is not known, although one has as many classes."""
    ours, other = (torch.zeros(4, 3, requires_grad=True) * 1 for _ in range(2))
    labels = torch.zeros(4, dtype=torch.long)
    found = [read_task_loss(nn.functional.cross_entropy(logits, labels), ours) for logits in (ours, other)]
    assert [(one.form, one.axis) for one in found] == [("softmax", 1), ("softmax", None)]


@pytest.mark.parametrize(
    ("turned", "axis"),
    [
        (lambda x: x, 1),
        (lambda x: x.transpose(1, 2), 2),
        (lambda x: x.transpose(0, 2).transpose(0, 2), 1),
        (lambda x: x.permute(0, 2, 1), 2),
        (lambda x: x[:, :, :4].float() * 2 + 1, 1),
        (lambda x: x.reshape(-1, 5), 2),
        (lambda x: x.transpose(-1, -2), None),  # of an axis from behind it is not known which
        (lambda x: x.cumsum(1), None),
    ],
)
def test_the_axis_of_classes_is_followed_to_the_outputs(turned, axis):
    """Through what the loss does to them, although two axes are as long as there are classes."""
    logits = torch.zeros(2, 5, 5, requires_grad=True) * 1
    scores = turned(logits)
    labels = torch.zeros(scores.shape[:1] + scores.shape[2:], dtype=torch.long)
    assert read_task_loss(nn.functional.cross_entropy(scores, labels), logits).axis == axis


@pytest.mark.parametrize(
    ("batch", "counted"),
    [
        ((0, torch.tensor([1, -100, 0])), [True, False, True]),
        ({"labels": torch.tensor([1, -100, 0])}, [True, False, True]),
        ((0, torch.tensor([1.0, -100.0, 0.0])), None),
        ((0, torch.tensor([1, -100])), None),
        ((0, "labels"), None),
        ({"x": 0}, None),
        ((0,), None),
        (0, None),
        (None, None),
    ],
)
def test_labels_of_a_batch_say_what_counts_where_the_loss_does_not(batch, counted):
    logits = torch.zeros(3, 2, requires_grad=True) * 1
    found = read_task_loss(nn.functional.binary_cross_entropy_with_logits(logits, torch.zeros(3, 2)), logits, batch)
    assert (found.form, None if found.counted is None else found.counted.tolist()) == ("sigmoid", counted)
