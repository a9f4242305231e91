"""Cells and lines of a plan's table."""

from __future__ import annotations

import copy

import pytest
from rich.table import Table
from torch import nn

import conservtl as ctl
from conservtl.methods.l2_sp import L2Penalty
from conservtl.plan.plan import Plan
from conservtl.plan.row import Phase, Row
from conservtl.plan.table import as_html, as_rich, lines, named, summary


def row(name="a.weight", **fields):
    given = {"layer": name.split(".")[0], "depth": 0.0, "shape": (2, 3), "kind": "weight", "source_shape": (2, 3)}
    return Row(name=name, **{**given, **fields})


def fresh(name="a.weight", **fields):
    return row(name, **{"origin": "fresh", "reason": "missing in the source", "source_shape": None, **fields})


def cells(*rows, **fields):
    """The cells of the first layer, without its name."""
    return lines(Plan(rows=rows, **fields))[0][1:]


def pulling(**fields):
    return (L2Penalty(by="L2SP", names=("a.weight",), **fields),)


def test_a_layer_in_parts():
    rows = (row(pull=0.5, lr=1e-3), row("a.bias", frozen=True, kind="bias"), fresh("a.extra", lr=1e-2))
    assert cells(*rows, penalties=pulling(mode="decoupled")) == (
        "18", "source, part fresh", "part trained", "0.001 … 0.01", "0.5 decoupled", "optimizer's",
    )  # fmt: skip


def test_a_strength_with_how_often_it_acts_and_the_weight_decay_beside_it():
    assert cells(row(pull=0.5), penalties=pulling(every=3))[4:] == ("0.5, every 3 steps", "–")
    assert cells(row(pull=0.5), penalties=pulling(every=2, mode="decoupled"))[4] == "0.5 decoupled, every 2 steps"
    assert cells(row(pull=0.5))[4:] == ("0.5", "optimizer's")  # no penalty yet
    assert cells(row(), row("a.bias", kind="bias", weight_decay=False))[4:] == ("–", "optimizer's")
    assert cells(row(weight_decay=False))[5] == "–"


def test_states():
    """Frozen as found if all of it is; the first phase that trains a part of it."""
    found = {"found": "frozen", "frozen": True}
    assert cells(row(**found), row("a.bias", **found))[2:4] == ("frozen as found", "–")
    assert cells(row(**found), row("a.bias", frozen=True))[2] == "frozen"
    phases = (Phase(epochs=1, frozen=("a.weight",)), Phase(epochs=1, frozen=("a.weight",)), Phase())
    plan = Plan(rows=(row(), row("b.weight")), phases=phases)
    assert [line[3] for line in lines(plan)] == ["trained from phase 3", "trained"]
    assert cells(row(), row("a.bias", frozen=True), fresh("b.weight"), phases=phases)[2] == "part trained from phase 3"


def test_additions_of_a_strategy_hide_no_reason_of_a_layers_own():
    """The fresh head is told first, whatever was added before or behind it; one reason a module."""
    plan = Plan(
        rows=(
            fresh("a.lora.b", layer="a", reason="factors, whose product starts at 0", added=True),
            fresh("a.fc.weight", layer="a", reason="shape differs: (3, 8) here"),
            fresh("a.fc.bias", layer="a", reason="shape differs: (3,) here", shape=(3,)),
            fresh("a.other.weight", layer="a", reason="missing in the source"),
        )
    )
    told = "fresh  a: shape differs: (3, 8) here; missing in the source; factors, whose product starts at 0"
    assert told in summary(plan)


def test_a_layer_that_a_phase_trains_in_part():
    rows = tuple(row(f"a.{name}", layer="a") for name in ("body", "head"))
    phases = (Phase(name="head", epochs=1, frozen=("a.body",)), Phase(name="all"))
    plan = Plan(rows=rows, phases=phases)
    assert lines(plan)[0][3] == "part trained, all from phase 2"
    assert [line.partition("trains ")[2] for line in summary(plan) if line.startswith("phase")] == ["a (part)", "a"]
    late = Plan(
        rows=(*rows, row("b.weight")), phases=(Phase(name="none", epochs=1, frozen=("a.body", "a.head")), *phases)
    )
    assert lines(late)[0][3] == "part trained from phase 2, all from phase 3"


def test_totals_reasons_and_remarks():
    """A layer is named by the first of its reasons, one of new labels by its rows."""
    plan = Plan(
        rows=(
            fresh("a.weight", reason="first"),
            fresh("a.bias", reason="second", shape=(2,)),
            row("b.weight", frozen=True, found="fixed"),
            row("c.weight", source_shape=(5, 3), shape=(4, 3), source_rows=(4, None, 0, 1)),
            row("d.weight", source_shape=(2, 3), source_rows=(1, 0)),
        ),
        notes=("not used: 1 of 2 tensors", "data: 3 labels"),
    )
    assert summary(plan) == [
        "32 parameters: 26 trained (81.2 %), 6 frozen",
        "21 copied from the source, 11 fresh",
        "rows copied by label  c: 3 of 4 (2 of the source's 5 not used)",
        "rows copied by label  d: 2 of 2",
        "fresh  a: first",
        "frozen as found  6 parameters in b: no gradient was asked for when handed in",
        "source  not used: 1 of 2 tensors",
        "data  3 labels",
    ]
    assert summary(Plan(rows=()))[0] == "0 parameters: 0 trained (0.0 %), 0 frozen"


@pytest.mark.parametrize(("most", "said"), [(4, "a, b, c, d"), (3, "a … d (4 layers)")])
def test_more_layers_than_fit_are_named_by_the_ends(most, said):
    assert named(["a", "b", "c", "d"], most) == said


def test_more_than_three_layers_of_a_phase_are_named_by_the_ends():
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(5)))
    plan = ctl.adapt(model, copy.deepcopy(model), [ctl.GradualUnfreezing(by="layer")]).plan
    told = [line.rpartition("trains ")[2] for line in str(plan).splitlines() if line.startswith("phase ")]
    assert told == ["4", "3, 4", "2, 3, 4", "1 … 4 (4 layers)", "0 … 4 (5 layers)"]


def test_frozen_layers_are_pale_and_fresh_ones_stand_out():
    plan = Plan(rows=(row(frozen=True), row("b.weight"), fresh("c.weight")))
    (table,) = (one for one in as_rich(plan).renderables if isinstance(one, Table))
    assert [one.style for one in table.rows] == ["dim", "", "yellow"]
    assert [column.justify for column in table.columns] == ["left", "right", *["left"] * 5]
    body = as_html(plan).partition("<tbody>")[2].split("<tr ")[1:]
    assert ["opacity:0.8" in one.partition(">")[0] for one in body] == [True, False, False]
    assert ["font-weight:bold" in one.partition(">")[0] for one in body] == [False, False, True]
    assert [one.partition(";")[0] for one in body[0].split("text-align:")[1:]] == ["left", "right", *["left"] * 5]
