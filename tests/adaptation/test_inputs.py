"""Inputs as users have them: the model and the source are called alike, in a loop, in ``fit`` and in ``evaluate``."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.data import DataLoader

import conservtl as ctl
from conservtl.labels import call_with

X, CONTEXT, MASK = torch.randn(6, 4), torch.randn(6, 4), torch.ones(6, 4)
LABELS = torch.arange(6) % 2


class Two(nn.Module):
    """Two inputs, and one more that is optional."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor, context: Tensor, gain: Tensor | None = None) -> Tensor:
        return self.head(self.body(x if gain is None else x * gain).tanh() + 2 * context)


def adapted() -> ctl.Adaptation:
    torch.manual_seed(0)
    model, source = Two(), Two()
    adaptation = ctl.adapt(model, source, [ctl.OutputConservation(weight=0.5)])
    with torch.no_grad():
        model.body.weight.add_(0.1)
    return adaptation


@pytest.mark.parametrize("kind", [tuple, list])
@pytest.mark.parametrize("gain", [(), (MASK / 2,)])
def test_a_list_is_taken_as_a_tuple_is(kind, gain):
    adaptation = adapted()
    named = dict(zip(("x", "context", "gain"), (X, CONTEXT, *gain), strict=False))
    totals = []
    for inputs in (kind((X, CONTEXT, *gain)), named):
        outputs = adaptation.model(**named)
        totals.append(adaptation.loss(outputs.square().mean(), outputs, inputs))
    assert totals[0] == totals[1] != outputs.square().mean()
    assert torch.equal(adaptation.source_view(kind((X, CONTEXT, *gain))).outputs, adaptation.at_start()(**named))


def test_pairs_of_inputs_in_fit_and_evaluate():
    """A ``DataLoader`` makes a list of each pair."""
    rows = [((x, context), label) for x, context, label in zip(X, CONTEXT, LABELS, strict=True)]
    loader = DataLoader(rows, batch_size=3)
    assert type(next(iter(loader))[0]) is list
    adaptation = adapted()
    result = ctl.evaluate(adaptation, {"target": loader})
    expected = (adaptation.model(X, CONTEXT).argmax(1) == LABELS).double().mean()
    assert result.after["target"]["accuracy"] == pytest.approx(expected.item())
    start = adaptation.model.head.weight.detach().clone()
    ctl.fit(adaptation, loader, training=ctl.Training(epochs=1, lr=0.1))
    assert not torch.equal(adaptation.model.head.weight, start)


def test_pairs_of_inputs_in_a_measurement():
    model = adapted().model
    pairs = [((X, CONTEXT), LABELS)]
    importance = []
    for batches in (pairs, [([X, CONTEXT], LABELS)], [{"x": X, "context": CONTEXT, "labels": LABELS}]):
        adaptation = ctl.adapt(copy.deepcopy(model), model, [ctl.FisherSP()])
        adaptation.measure(batches)
        importance.append(next(iter(adaptation.measured.values())))
    assert all(torch.equal(importance[0][name], one[name]) for one in importance[1:] for name in one)


class OneOfSeveral(nn.Module):
    """One input of several parts, and a setting."""

    def forward(self, parts: tuple[Tensor, Tensor], flag: bool = True) -> Tensor:
        return parts[0] - parts[1]


class Images(nn.Module):
    """A list of images, as detectors take it."""

    def forward(self, images: Sequence[Tensor], targets: Tensor | None = None) -> Tensor:
        assert isinstance(images, (list, tuple))
        return sum(image.sum() for image in images)


class Unannotated(nn.Module):
    def forward(self, parts, flag=True):
        assert flag is True
        return parts[0] - parts[1]


class Optional(nn.Module):
    def forward(self, x=None, mask=None, scale=1.0):
        return (x if mask is None else x * mask) * scale


class Packed(nn.Module):
    def forward(self, x, state=None):
        assert isinstance(x, PackedSequence)
        return x.data


class Any(nn.Module):
    def forward(self, *parts):
        return parts[0] - parts[1]


class Pair(NamedTuple):
    """Two inputs by name."""

    first: Tensor
    second: Tensor


@pytest.mark.parametrize("kind", [tuple, list])
@pytest.mark.parametrize(
    ("model", "inputs", "expected"),
    [
        (OneOfSeveral(), (X, CONTEXT), X - CONTEXT),
        (Unannotated(), (X, CONTEXT), X - CONTEXT),
        (Any(), (X, CONTEXT), X - CONTEXT),
        (Images(), (X, CONTEXT), X.sum() + CONTEXT.sum()),
        (Images(), (X,), X.sum()),
        (Optional(), (X,), X),
        (Optional(), (X, MASK / 2), X / 2),
        (Optional(), (X, MASK / 2, 3.0), 1.5 * X),
        (nn.Identity(), (X,), X),
    ],
)
def test_one_argument_or_several(kind, model, inputs, expected):
    torch.testing.assert_close(call_with(model, kind(inputs)), expected)


def test_named_tuples_of_one_argument():
    assert torch.equal(call_with(OneOfSeveral(), Pair(X, CONTEXT)), X - CONTEXT)
    packed = pack_sequence([X, CONTEXT[:2]])
    assert torch.equal(call_with(Packed(), packed), packed.data)


@pytest.mark.parametrize("inputs", [[X], (X, CONTEXT, MASK, MASK)])
def test_too_few_and_too_many(inputs):
    received = rf"received a {type(inputs).__name__} of {len(inputs)}"
    with pytest.raises(ctl.SpecError, match=rf"Two takes x, context, gain; {received}"):
        call_with(Two(), inputs)
