"""Entropy and class confusion of outputs without labels, against loops over plain floats."""

from __future__ import annotations

import math

import pytest
import torch

import conservtl as ctl
from conservtl.methods import as_strategy
from conservtl.methods.entropy_minimisation import EntropyTerm
from conservtl.plan.term import View


def by_hand(examples, *, weight, entropy, temperature, blank):
    """Term of lists of logits, a list of positions for each example."""
    values = []
    for rows in examples:
        soft = []
        for row in rows:
            e = [math.exp(value / temperature) for value in row]
            soft.append([value / sum(e) for value in e])
        spoken = [p for p, row in zip(soft, rows, strict=True) if row.index(max(row)) != blank]
        h = [-sum(value * math.log(value) for value in p) for p in spoken]
        k = len(rows[0])
        c = [[sum(p[i] * p[j] for p in soft) for j in range(k)] for i in range(k)]
        confused = sum(c[i][j] / sum(c[i]) for i in range(k) for j in range(k) if i != j) / k
        values.append(entropy * sum(h) / max(1, len(h)) + (1 - entropy) * confused)
    return weight * sum(values) / len(values)


def drawn(*shape):
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(3))


SETTINGS = {"weight": 0.7, "entropy": 0.3, "temperature": 2.5}


def term(**changes):
    return EntropyTerm(by="x", **(SETTINGS | changes))


@pytest.mark.parametrize("blank", [None, 0])
def test_frames_of_utterances_without_padding_and_without_blanks(blank):
    """SUTA: entropy of frames that are no blank, confusion over all; the mean over utterances of different lengths."""
    logits, lengths = drawn(3, 6, 4), [6, 4, 1]
    logits[2, 0, 0] = 20.0  # all blank: no entropy
    expected = by_hand(
        [rows[:count].tolist() for rows, count in zip(logits, lengths, strict=True)], blank=blank, **SETTINGS
    )
    found = term(blank=blank).value(View((logits, torch.tensor(lengths))), None, {})
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_the_examples_of_a_batch_are_the_positions_of_a_classifier():
    logits = drawn(5, 3)
    expected = by_hand([logits.tolist()], blank=None, **SETTINGS)
    assert term().value(View(logits), None, {}).item() == pytest.approx(expected, rel=1e-5)


def test_pixels_are_the_positions_of_an_image():
    logits = drawn(2, 3, 2, 2)
    rows = [[logits[n, :, y, x].tolist() for y in range(2) for x in range(2)] for n in range(2)]
    expected = by_hand(rows, blank=None, **SETTINGS)
    assert term().value(View(logits), None, {}).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_certain_outputs_give_neither_value_nor_a_gradient_that_is_no_number(share):
    logits = (1e4 * torch.eye(3)[[0, 1, 1]]).unsqueeze(0).requires_grad_()  # the third class has no probability
    value = term(entropy=share).value(View(logits), None, {})
    value.backward()
    assert value.item() == pytest.approx(0.0, abs=1e-6)
    assert logits.grad.isfinite().all()


def test_one_class_for_all_has_no_entropy_but_confusion_has_its_gradient_against_it():
    """The trivial minimum of the entropy is none of the confusion: equal rows are confused as their classes are."""
    logits = torch.tensor([[2.0, 0.0], [2.0, 0.0]]).unsqueeze(0)
    p = math.exp(2) / (1 + math.exp(2))
    confused = term(weight=1, entropy=0, temperature=1).value(View(logits), None, {})
    assert confused.item() == pytest.approx(((1 - p) + p) / 2, rel=1e-5)


def test_the_short_name_is_that_of_the_paper_for_ctc():
    found = as_strategy({"kind": "suta", "weight": 0.5})
    assert (found.blank, found.entropy, found.temperature, found.weight) == (0, 0.3, 2.5, 0.5)


@pytest.mark.parametrize(
    ("logits", "changes", "message"),
    [
        (torch.zeros(4), {}, r"two classes or more.*received shape \(4,\)"),
        (torch.zeros(4, 1), {}, r"two classes or more.*received shape \(4, 1\)"),
        (torch.zeros(4, 3), {"blank": 3}, r"blank must be one of 3 classes, from 0; received 3"),
        (torch.zeros(4, 3), {"class_axis": 0}, r"two classes or more"),
    ],
)
def test_outputs_that_are_no_classes_are_refused(logits, changes, message):
    with pytest.raises(ctl.SpecError, match=message):
        term(**changes).value(View(logits), None, {})
