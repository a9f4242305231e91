"""Each upgrade of an old plan's fields, by hand."""

from __future__ import annotations

import pytest

from conservtl.plan.upgrade import decayed_by_default, upgrade


def row(name="a.weight", kind="weight", shape=(2, 2), **fields):
    return {"name": name, "kind": kind, "shape": shape, **fields}


@pytest.mark.parametrize(
    ("given", "decayed"),
    [
        (row("a.bias", "bias", (2,)), True),
        (row("a.bias", "bias", (2,), weight_decay=True), True),
        (row("a.bias", "bias", (2,), weight_decay=False), False),
        (row("a.bias", "bias", (2,), chosen={"weight_decay": {"by": "X", "explicit": False}}), False),
        (row("a.bias", "bias", (2,), chosen={"rate": {"by": "X", "explicit": False}}), True),
        (row("a.bias", "bias", (2,), found="trained"), False),  # not of the first versions
        (row("a.norm", "norm", (2,)), True),
        (row(), False),
    ],
)
def test_biases_and_norms_are_decayed_no_more(given, decayed):
    assert decayed_by_default({"rows": [given]}) == ({given["name"]} if decayed else set())
    (after,) = upgrade({"rows": [given]})["rows"]
    assert after == ({**given, "weight_decay": False} if decayed else given)


def test_a_search_is_no_measurement():
    best = {"kind": "best_block", "by": "X", "data": "target", "candidates": ["a"]}
    others = [{"kind": "fisher"}, {"kind": "other_search"}]
    found = upgrade({"measures": [others[0], best], "searches": [others[1]]})
    assert found == {
        "measures": [others[0]],
        "searches": [others[1], {key: best[key] for key in ("kind", "by", "candidates")}],
    }
    assert upgrade({"measures": [others[0]]}) == {"measures": [others[0]]}


def test_the_share_of_statistics_of_each_example_is_an_extension():
    chosen = {"chosen": {"statistics": {"by": "NormAdaptation"}}}
    rows = [row("a", instance=0.25, **chosen), row("b", instance=None), row("c", instance=0.25, **chosen)]
    found = upgrade({"rows": [{**one, "found": "trained"} for one in rows]})
    assert found["extensions"] == (
        {"kind": "instance_statistics", "by": "NormAdaptation", "share": 0.25, "names": ("a", "c")},
    )
    assert not any("instance" in one for one in found["rows"])
    assert "extensions" not in upgrade({"rows": [row(instance=None)]})


def test_axes_of_channels_are_found_anew():
    terms = [{"kind": "features", "first": {"a": 1}, "alpha": 1}, {"kind": "outputs", "first": 2}]
    found = upgrade({"terms": terms, "measures": [{"kind": "attention", "first": {}}]})
    assert found["measures"] == [{"kind": "attention"}]
    assert found["terms"][0] == {"kind": "features", "alpha": 1}
    assert upgrade({"terms": terms[1:]}) == {"terms": terms[1:]}


def test_penalties_of_rows_that_are_pulled_alike_are_one():
    """The author is one who chose for all rows; a decay is decoupled if one of them is."""

    def pulled(name, mode, by, explicit, **fields):
        chosen = {column: {"by": by, "explicit": explicit} for column in ("pull", "decay")}
        return row(
            name, found="trained", mode=mode, importance=None, anchor="fp32", anneal=None, chosen=chosen, **fields
        )

    rows = [
        pulled("a", "coupled", "Named", True, pull=0.1),
        pulled("b", "coupled", "All", False, pull=0.2),
        pulled("c", "decoupled", "Named", True, pull=0.1),
        pulled("d", "coupled", "Named", True, decay=0.1),
        pulled("e", "decoupled", "All", False, decay=0.1),
        pulled("f", "coupled", "All", False),
    ]
    assert upgrade({"rows": rows})["penalties"] == [
        {"kind": "l2_decay", "by": "All", "names": ["d", "e"], "mode": "decoupled"},
        {"kind": "l2_sp", "by": "All", "names": ["a", "b"], "mode": "coupled", "anchor": "fp32", "reads": ()},
        {"kind": "l2_sp", "by": "Named", "names": ["c"], "mode": "decoupled", "anchor": "fp32", "reads": ()},
    ]
