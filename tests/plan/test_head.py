"""The head of a plan: told, asked of the model, or the last weight's module."""

from __future__ import annotations

import pytest

import conservtl as ctl
from conservtl.plan.plan import Plan
from conservtl.plan.row import Row


def plan(*names, aliases=(), kind="weight", **fields):
    """Rows of names such as ``layer.module.weight``."""
    rows = tuple(
        Row(name=name, layer=name.split(".")[0], depth=0.0, shape=(2, 2), source_shape=(2, 2), kind=kind,
            aliases=aliases if number == 0 else ())
        for number, name in enumerate(names)
    )  # fmt: skip
    return Plan(rows=rows, **fields)


NAMES = ("a.x.weight", "b.x.weight", "b.y.weight", "b.z.weight", "b.z.bias")


def test_the_last_weight_of_the_last_layer_has_the_head_if_none_is_told():
    drawn = plan(*NAMES)
    assert (drawn.head_module, drawn.head) == ("b.z", ("b.z.weight", "b.z.bias"))
    assert drawn.possible_head == {"b.z.weight", "b.z.bias"}
    assert plan("a.weight", "b.x.weight", "b.y.weight", kind="norm").head == ("b.y.weight",)


def test_one_that_is_told_wins_over_candidates():
    drawn = plan(*NAMES, heads=("a.x",), head_candidates=("b.x", "b.y"))
    assert (drawn.head_module, drawn.head, drawn.possible_head) == ("a.x", ("a.x.weight",), {"a.x.weight"})


def test_candidates_are_refused_where_the_head_is_needed():
    drawn = plan(*NAMES, head_candidates=("b.x", "b.y"))
    assert drawn.possible_head == {"b.x.weight", "b.y.weight"}
    with pytest.raises(ctl.SpecError, match=r"\['b\.x', 'b\.y'\] may be, .* adapt\(\.\.\., head=\['b\.x'\]\)"):
        drawn.head  # noqa: B018


def test_a_head_of_two_modules_is_no_single_one():
    drawn = plan(*NAMES, heads=("b.x", "b.y"))
    assert drawn.head == ("b.x.weight", "b.y.weight")
    with pytest.raises(ctl.SpecError, match=r"the head is \['b\.x', 'b\.y'\]"):
        drawn.head_module  # noqa: B018


def test_a_head_is_tied_to_modules_outside_it():
    assert plan("a.x.weight", "b.y.weight", aliases=("b.z.weight",), heads=("b.z",)).tied_head == ("a.x.weight",)
    assert plan("b.z.weight", aliases=("b.y.weight",), heads=("b.y", "b.z")).tied_head == ()


def test_plans_are_equal_whatever_they_say_of_the_head_and_the_source():
    drawn = plan(*NAMES)
    for field in ("heads", "head_candidates", "outputs", "notes"):
        assert plan(*NAMES, **{field: ("b.x",)}) == drawn
    assert drawn.with_facts({"block": "1"}) != drawn
    assert drawn != "a plan"


def test_facts_replace_those_of_their_name():
    drawn = plan(*NAMES).with_facts({"a": "1", "b": "2"}).with_facts({"b": "3"})
    assert drawn.facts == {"a": "1", "b": "3"}
