"""Decisions beside the rows: told apart by kind, and asked for no more than they need."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import nn

import conservtl as ctl
from conservtl.methods import builtin_strategies
from conservtl.plan.decision import Decision
from conservtl.plan.plan import Plan
from conservtl.plan.update import Update
from conservtl.testing import check_strategy
from conservtl.testing.weights import random_weights


def network():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def adapted(*strategies):
    return ctl.adapt(network(), random_weights(network(), 0), strategies)


class Careless(Update):
    """Acts in steps that are skipped, too."""

    kind: Literal["careless"] = "careless"

    def describe(self):
        return "shrinks"

    def after(self, step, state):
        for item in step.moving:
            item.parameter.mul_(0.9)


class Shrink(ctl.Strategy):
    """Puts it into the plan."""

    kind: Literal["shrink"] = "shrink"

    def apply(self, plan):
        return plan.with_update(Careless(by=self.label, names=tuple(row.name for row in plan.rows)))


def test_a_kind_that_is_taken_is_refused():
    """It would stand for the other in every plan that is read from a file."""
    with pytest.raises(
        ctl.SpecError, match=r"kind 'mixout' of .*Other is that of conservtl\.methods\.mixout\.MixoutUpdate"
    ):

        class Other(Update):
            kind: Literal["mixout"] = "mixout"

    plan = adapted(ctl.Mixout()).plan
    assert Plan(**plan.model_dump(mode="json")) == plan


def test_a_kind_that_is_not_known_is_named():
    fields = adapted(Shrink()).plan.model_dump(mode="json")
    fields["updates"][0]["kind"] = "elsewhere"
    with pytest.raises(ValueError, match="no Update of kind 'elsewhere': import its class first"):
        Plan(**fields)


def test_the_contract_finds_an_update_that_acts_in_a_skipped_step():
    with pytest.raises(AssertionError, match=r"moved in a step that was skipped; heed step\.skip"):
        check_strategy(Shrink())


def test_rates_from_gradients_keep_no_second_copy_of_the_model():
    """Anchors are placed for those who ask."""
    adaptation = adapted(ctl.AutoRGN())
    optimizer = adaptation.optimizer(torch.optim.SGD, lr=0.1)
    adaptation.model(torch.randn(5, 3)).square().mean().backward()
    optimizer.step()
    assert adaptation.bound.anchors.placed == {}


class TestBatches:
    @pytest.mark.parametrize(
        "strategy", [ctl.FisherSP(), ctl.NormAdaptation(), ctl.FeatureConservation(attention=True)]
    )
    def test_a_generator_is_refused(self, strategy):
        """Looking whether there are any would take its first batch, and going through it again would find none."""
        x, y = torch.randn(4, 3), torch.tensor([0, 1, 0, 1])
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
        adaptation = ctl.adapt(model, random_weights(model, 0), [strategy], example=x)
        for batches, received in (
            (((x, y) for _ in range(2)), "a generator"),
            ((x, y), "one batch, a tuple"),
            ({"x": x, "labels": y}, "one batch, a dict"),
        ):
            with pytest.raises(ctl.DataError, match=f"{strategy.label}: batches must be a list .*received {received}"):
                adaptation.measure(batches)
        adaptation.measure([(x, y)])

    def test_so_it_is_when_training_is_over(self):
        adaptation = adapted(ctl.WeightInterpolation(t=0.5))
        with pytest.raises(ctl.DataError, match=r"finish\(valid=\.\.\.\): batches must be a list"):
            adaptation.finish(valid=iter([torch.zeros(2, 3)]))


def test_the_penalty_of_what_is_not_measured_says_so():
    with pytest.raises(ctl.SpecError, match="FisherSP needs a measurement first"):
        adapted(ctl.FisherSP()).penalty()


def test_the_plan_says_that_a_pull_is_weighed():
    assert "0.1 × fisher" in str(adapted(ctl.FisherSP(alpha=0.1)).plan)
    assert "fisher" not in str(adapted(ctl.L2SP(alpha=0.1)).plan)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"kind": "l3_sp"}, r"strategies\.0: 'l3_sp' is none of auto_rgn, .*wise_ft\. Did you mean 'l\w+'\?"),
        (
            {"kind": "nothing like it"},
            r"strategies\.0: 'nothing like it' is none of auto_rgn, .*wise_ft\. To use .* `--import package\.module`",
        ),
    ],
)
def test_an_unknown_strategy_is_answered_with_the_nearest(fields, said):
    with pytest.raises(ctl.SpecError, match=said):
        adapted(fields)


def test_a_glob_that_matches_nothing_names_its_strategy():
    with pytest.raises(ctl.SpecError, match=r"FeatureConservation: 'layer9': must match at least one"):
        adapted(ctl.FeatureConservation(layers=["layer9"]))


def test_a_number_of_taps_is_no_string():
    with pytest.raises(ValueError, match="layers"):
        ctl.FeatureConservation(layers="3")


def test_other_inputs_than_the_outputs_came_from():
    adaptation = adapted(ctl.FeatureConservation(layers=["0"]))
    x = torch.randn(4, 3)
    outputs = adaptation.model(x)
    with pytest.raises(ctl.SpecError, match=r"features are of 4 examples, the source's of 2\. Give loss"):
        adaptation.loss(outputs.square().mean(), outputs, x[:2])


def test_a_penalty_needs_no_more_than_weighs_it():
    """Statistics that are still to be measured have no part in it."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    adaptation = ctl.adapt(model, random_weights(model, 0), [ctl.NormAdaptation(train="all"), ctl.L2SP()])
    assert adaptation.outstanding()
    assert adaptation.penalty().item() == 0


@pytest.mark.parametrize("cls", builtin_strategies().values(), ids=lambda cls: cls.__name__)
def test_a_field_that_a_file_leaves_out_means_the_default_of_its_strategy(cls):
    """Plans in files of earlier versions lack fields that came later."""
    home = ".".join(cls.__module__.split(".")[:3])
    defaults = {name: field.default for name, field in cls.model_fields.items() if name != "kind"}
    for decision in [one for one in Decision.kinds.values() if f"{one.__module__}.".startswith(f"{home}.")]:
        for name, field in decision.model_fields.items():
            said = defaults.get(name)
            if said is not None and not field.is_required() and (decision.__name__, name) not in OTHERWISE:
                assert field.default == said, (decision.__name__, name)


OTHERWISE = {("ProjectionUpdate", "relative")}  # radii were lengths before they could be ratios
