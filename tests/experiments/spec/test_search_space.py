"""Fields that a spec marks for a search."""

from __future__ import annotations

import pytest

import conservtl as ctl
from conservtl.experiments.spec.fields import with_values
from conservtl.experiments.spec.search_space import SearchRange, ranges_of

CONTENT = {
    "training": {"lr": {"range": [1e-5, 1e-3], "log": True}, "optimizer": {"choices": ["adamw", "sgd"]}},
    "strategies": [{"kind": "l2_sp", "alpha": {"range": [1, 100]}}],
}


def test_marks_are_found_wherever_they_stand():
    found = ranges_of(CONTENT)
    assert list(found) == ["training.lr", "training.optimizer", "strategies.0.alpha"]
    assert found["training.lr"] == SearchRange(range=(1e-5, 1e-3), log=True)
    assert found["strategies.0.alpha"].whole
    assert not found["training.lr"].whole


def test_values_take_their_place_and_the_content_stays():
    filled = with_values(CONTENT, {"training.lr": 1e-4, "training.optimizer": "sgd", "strategies.0.alpha": 3})
    assert filled == {
        "training": {"lr": 1e-4, "optimizer": "sgd"},
        "strategies": [{"kind": "l2_sp", "alpha": 3}],
    }
    assert ranges_of(CONTENT)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"range": [2, 1]}, "training.lr: .*must rise"),
        ({"range": [0, 1], "log": True}, "begins above 0"),
        ({"range": [1, 2], "choices": [1]}, "either a range or choices"),
        ({"choices": []}, "training.lr"),
        ({"range": [1]}, "training.lr"),
    ],
)
def test_malformed_marks_are_refused(field, message):
    with pytest.raises(ctl.SpecError, match=message):
        ranges_of({"training": {"lr": field}})


def test_none_at_all():
    with pytest.raises(ctl.SpecError, match="no field is marked"):
        ranges_of({"training": {"lr": 1.0}})
