"""Layer transfer from either side, by number, fraction and glob."""

from __future__ import annotations

import pytest
from pydantic import ValidationError
from torch import nn

import conservtl as ctl
from conservtl.methods import apply_all
from conservtl.testing.choices import whole_plan
from conservtl.testing.weights import random_weights


def network(layers=5, classes=2):
    return nn.Sequential(*(nn.Linear(2, 2) for _ in range(layers - 1)), nn.Linear(2, classes))


def applied(*strategies, model=None):
    return apply_all(whole_plan(network() if model is None else model), strategies)


def layers_where(plan, **fields):
    return [
        layer for layer, rows in plan.by_layer() if all(getattr(r, k) == v for r in rows for k, v in fields.items())
    ]


@pytest.mark.parametrize(
    ("side", "layers", "expected"),
    [
        ("input", 2, "01"),
        ("output", 2, "34"),
        ("input", 5, "01234"),
        ("output", 1, "4"),
        ("input", 0.4, "01"),
        ("output", 0.4, "34"),
        ("input", 0.01, "0"),
        ("output", 1.0, "01234"),
        ("input", ("0", "3"), "03"),
        ("output", ("[12]",), "12"),
    ],
)
def test_which_layers_are_copied_and_held(side, layers, expected):
    plan = applied(ctl.LayerTransfer(side=side, layers=layers))
    assert layers_where(plan, frozen=True) == list(expected)
    assert layers_where(plan, origin="source") == list("01234")


@pytest.mark.parametrize("freeze", [True, False])
def test_anb_and_anb_plus(freeze):
    """The rest fresh: held for AnB, fine-tuned for AnB+."""
    plan = applied(ctl.LayerTransfer(layers=2, rest="fresh", freeze=freeze))
    assert layers_where(plan, origin="source") == ["0", "1"]
    assert layers_where(plan, origin="fresh", reason="declared fresh by LayerTransfer") == ["2", "3", "4"]
    assert layers_where(plan, frozen=True) == (["0", "1"] if freeze else [])


def test_two_sides_share_a_model():
    """Each names its own layers; what both leave is fresh, in either order."""
    ends = ctl.LayerTransfer(layers=1, rest="fresh"), ctl.LayerTransfer(side="output", layers=1, rest="fresh")
    for pair in (ends, ends[::-1]):
        plan = applied(*pair)
        assert layers_where(plan, origin="source", frozen=True) == ["0", "4"]
        assert layers_where(plan, origin="fresh", frozen=False) == ["1", "2", "3"]


def test_two_that_name_the_same_layer_are_refused():
    with pytest.raises(ctl.PlanError, match=r"LayerTransfer and LayerTransfer both choose the origin of '1\.weight'"):
        applied(ctl.LayerTransfer(layers=2), ctl.LayerTransfer(layers=["1"]))


def test_a_layer_that_does_not_fit():
    """The message names the layer, the parameter and both shapes."""
    model, source = network(classes=3), network(classes=2)
    with pytest.raises(ctl.SourceError, match=r"layer '4'.*'4\.weight'.*\(3, 2\) here, \(2, 2\) in the source"):
        ctl.adapt(model, source, [ctl.LayerTransfer(side="output", layers=1)])
    with pytest.raises(ctl.SourceError, match=r"'4'.*missing in the source"):
        ctl.adapt(model, network(4).state_dict(), [ctl.LayerTransfer(layers=1.0)])
    with pytest.raises(ctl.SourceError, match=r"declared fresh by fresh=\['4'\]"):
        ctl.adapt(model, network(classes=3), [ctl.LayerTransfer(layers=1.0)], fresh=["4"])


def test_what_does_not_fit_elsewhere_is_fresh():
    plan = ctl.adapt(network(classes=3), network(), [ctl.LayerTransfer(layers=2)]).plan
    assert layers_where(plan, origin="fresh") == ["4"]


def test_more_layers_than_there_are():
    with pytest.raises(ctl.SpecError, match=r"layers=6.*\(5: 0, 1, 2, 3, 4\).*at most 5"):
        applied(ctl.LayerTransfer(layers=6))


def test_a_glob_that_matches_nothing():
    with pytest.raises(ctl.SelectorError, match=r"'5'.*at least one layer.*There are 0, 1, 2, 3, 4"):
        applied(ctl.LayerTransfer(layers=["5"]))


@pytest.mark.parametrize("layers", [0, -1, 0.0, 1.5, True, [], "0", None])
def test_bounds(layers):
    with pytest.raises(ValidationError):
        ctl.LayerTransfer(layers=layers)


def test_one_is_a_layer_and_one_point_zero_is_all():
    assert layers_where(applied(ctl.LayerTransfer(layers=1)), frozen=True) == ["0"]
    assert layers_where(applied(ctl.LayerTransfer(layers=1.0)), frozen=True) == list("01234")
    again = ctl.LayerTransfer.model_validate_json(ctl.LayerTransfer(layers=1.0).model_dump_json())
    assert isinstance(again.layers, float)


def test_counts_from_the_side_that_the_example_shows():
    """A model that registers its head first."""

    class HeadFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(2, 2)
            self.body = nn.Linear(2, 2)

        def forward(self, x):
            return self.head(self.body(x))

    import torch

    model = HeadFirst()
    adaptation = ctl.adapt(model, random_weights(model, 0), [ctl.LayerTransfer(layers=1)], example=torch.zeros(1, 2))
    assert layers_where(adaptation.plan, frozen=True) == ["body"]
