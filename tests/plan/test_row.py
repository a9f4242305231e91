"""A row's facts and a phase's length, by hand."""

from __future__ import annotations

import pytest

import conservtl as ctl
from conservtl.plan.row import Phase, Row, changed, like_bias


def row(shape=(2, 3), **fields):
    given = {"name": "a.weight", "layer": "a", "depth": 0.0, "kind": "weight", "source_shape": shape}
    return Row(shape=shape, **{**given, **fields})


@pytest.mark.parametrize(
    ("name", "kind", "shape", "like"),
    [
        ("a.weight", "weight", (4, 1), False),
        ("a.weight", "weight", (1, 1), False),
        ("a.weight", "weight", (2, 2, 1), False),
        ("a.gamma", "weight", (4, 1, 1), True),
        ("a.token", "weight", (1, 1, 1), True),
        ("a.weight", "norm", (4, 4), True),
        ("a.weight", "bias", (4,), True),
        ("a.bias_table", "weight", (4, 4), True),
        ("a.position_bias.weight", "weight", (4, 4), True),
        ("unbiased.a.weight", "weight", (4, 4), False),
    ],
)
def test_parameters_that_act_as_biases(name, kind, shape, like):
    assert like_bias(name, kind, shape) == like
    assert row(shape, name=name, kind=kind).like_bias == like


def test_rates_and_sizes():
    assert row(scale=0.5).rate(0.1) == 0.05
    assert row(scale=0.5, lr=1e-3).rate(0.1) == 1e-3
    assert row((2, 3, 4)).size == 24
    assert row(()).size == 1


def test_rows_by_label():
    """Of four labels one is new; the source has five, of which two are not used."""
    mixed = row((4, 3), source_shape=(5, 3), source_rows=(4, None, 0, 1))
    assert (mixed.new_rows, mixed.unused_rows) == ((1,), (2, 3))
    assert (mixed.copied_size, mixed.fresh) == (9, True)
    known = row((2, 3), source_shape=(2, 3), source_rows=(1, 0))
    assert (known.new_rows, known.unused_rows, known.copied_size, known.fresh) == ((), (), 6, False)
    plain = row((4, 3))
    assert (plain.new_rows, plain.unused_rows, plain.copied_size, plain.fresh) == ((), (), 12, False)
    fresh = row((4, 3), origin="fresh", reason="missing", source_shape=None)
    assert (fresh.copied_size, fresh.fresh) == (0, True)


@pytest.mark.parametrize(
    ("found", "frozen", "as_found"),
    [("trained", True, False), ("frozen", True, True), ("fixed", True, True), ("frozen", False, False)],
)
def test_frozen_as_found(found, frozen, as_found):
    assert row(found=found, frozen=frozen).as_found == as_found


@pytest.mark.parametrize(("shape", "steps"), [("sigmoid", 0), ("sigmoid", 10**6), ("linear", 10**6)])
def test_a_factor_far_from_the_middle(shape, steps):
    anneal = ctl.Anneal(steps=10**5, start=0.5, end=2.0, shape=shape, rate=1.0)
    assert anneal.factor(steps) == pytest.approx(2.0 if steps else 0.5)


@pytest.mark.parametrize(
    ("epochs", "of", "length", "lasts"),
    [
        (None, 10, None, "to the end"),
        (0.25, 10, 2, "25 % of the epochs"),
        (0.26, 10, 3, "26 % of the epochs"),
        (0.25, 1, 1, "25 % of the epochs"),
        (1, 10, 1, "1 epoch"),
        (2, 10, 2, "2 epochs"),
    ],
)
def test_the_length_of_a_phase(epochs, of, length, lasts):
    assert Phase(epochs=epochs).length(of) == length
    assert Phase(epochs=epochs).lasts == lasts


def test_the_first_wrong_value_is_named():
    with pytest.raises(ctl.PlanError, match=r"Mine gives 'a\.weight' lr=-1, which no row can hold"):
        changed(row(), "Mine", {"scale": -2, "lr": -1})
