"""Gradual unfreezing: who is trained in which phase, for how long, at what rate."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import nn

import conservtl as ctl


def plan_of(*strategies, fresh=(), layers=4):
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(layers)))
    source = {k: torch.zeros(v.shape) for k, v in model.state_dict().items()}
    return ctl.adapt(model, source, strategies, fresh=fresh).plan


def trained(plan):
    """Layers wholly or partly trained, phase by phase."""
    return [
        "".join(dict.fromkeys(r.layer for r in plan.rows if r.name not in plan.frozen_in(i)))
        for i in range(len(plan.phases))
    ]


def lengths(plan):
    return [(phase.epochs, phase.scale) for phase in plan.phases]


class TestByHead:
    def test_the_classic(self):
        plan = plan_of(ctl.GradualUnfreezing(epochs=2))
        assert trained(plan) == ["3", "0123"]
        assert lengths(plan) == [(2, 1.0), (None, 1.0)]

    def test_whatever_is_fresh(self):
        assert trained(plan_of(ctl.GradualUnfreezing(), fresh=["0", "3"])) == ["03", "0123"]

    def test_as_fastai(self):
        """fine_tune: one epoch of the head alone, then everything at half the rate."""
        plan = plan_of(ctl.GradualUnfreezing(scales=(1, 0.5)))
        assert lengths(plan) == [(1, 1.0), (None, 0.5)]

    def test_what_is_frozen_throughout_stays_frozen(self):
        plan = plan_of(ctl.GradualUnfreezing(), ctl.LayerTransfer(layers=2))
        assert trained(plan) == ["3", "23"]
        assert plan.trained == ("2.weight", "2.bias", "3.weight", "3.bias")

    def test_a_head_that_is_frozen_throughout(self):
        with pytest.raises(ctl.PlanError, match="phase 'head' trains nothing"):
            plan_of(ctl.GradualUnfreezing(), ctl.LayerTransfer(side="output", layers=1))


class TestByLayer:
    def test_from_the_output(self):
        plan = plan_of(ctl.GradualUnfreezing(by="layer", epochs=3, scales=(0.5, 0.1)))
        assert trained(plan) == ["3", "23", "123", "0123"]
        assert lengths(plan) == [(3, 0.5), (3, 0.5), (3, 0.5), (None, 0.1)]

    def test_from_the_input(self):
        assert trained(plan_of(ctl.GradualUnfreezing(by="layer", at="input"))) == ["0", "01", "012", "0123"]

    def test_frozen_layers_take_no_phase(self):
        plan = plan_of(ctl.GradualUnfreezing(by="layer"), ctl.LayerTransfer(layers=2))
        assert trained(plan) == ["3", "23"]

    def test_one_layer(self):
        assert trained(plan_of(ctl.GradualUnfreezing(by="layer"), layers=1)) == ["0"]


class TestWritten:
    def test_stages(self):
        stages = [
            ctl.Stage(train=["3"], epochs=2),
            ctl.Stage(train=["[01].weight", "3"], epochs=1, scale=0.5),
            ctl.Stage(scale=0.1),
        ]
        plan = plan_of(ctl.GradualUnfreezing(phases=stages))
        assert trained(plan) == ["3", "013", "0123"]
        assert plan.frozen_in(1) == {"0.bias", "1.bias", "2.weight", "2.bias"}
        assert lengths(plan) == [(2, 1.0), (1, 0.5), (None, 0.1)]

    def test_surgical(self):
        """One block trained, the rest held."""
        plan = plan_of(ctl.GradualUnfreezing(phases=[ctl.Stage(train=["0"])]))
        assert plan.trained == ("0.weight", "0.bias")

    def test_a_glob_that_matches_nothing(self):
        with pytest.raises(ctl.SelectorError, match="'headd'"):
            plan_of(ctl.GradualUnfreezing(phases=[ctl.Stage(train=["headd"])]))

    def test_every_default_written_out_is_the_same(self):
        """A resolved spec is read again; what contradicts the stages is refused."""
        strategy = ctl.GradualUnfreezing(phases=[ctl.Stage(train=["0"], epochs=1), ctl.Stage()])
        assert ctl.GradualUnfreezing(**strategy.model_dump(mode="json")) == strategy
        with pytest.raises(ValidationError, match=r"\['by', 'epochs'\] would be ignored"):
            ctl.GradualUnfreezing(phases=[ctl.Stage()], by="layer", epochs=2)


@pytest.mark.parametrize(
    "fields",
    [
        {"epochs": 0},
        {"scales": (0, 1)},
        {"scales": (1,)},
        {"phases": []},
        {"phases": [{"train": ["0"]}, {}]},
        {"by": "block"},
    ],
)
def test_bounds(fields):
    with pytest.raises(ValidationError):
        ctl.GradualUnfreezing(**fields)


def test_two_are_refused():
    with pytest.raises(ctl.PlanError, match="GradualUnfreezing sets phases, but"):
        plan_of(ctl.GradualUnfreezing(), ctl.GradualUnfreezing(by="layer"))
