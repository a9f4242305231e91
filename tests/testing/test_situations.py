"""The contract holds strategies to models in situations that they overlook."""

from __future__ import annotations

import doctest
from typing import Literal

import pytest
import torch
from torch import nn

import conservtl as ctl
from conservtl.functions import logits_of
from conservtl.plan import After, Penalty, Term
from conservtl.testing import check_strategy, situations
from conservtl.testing._situation_checks import check_situations


class TrainsAll(ctl.Strategy):
    """Names every row as if a person had."""

    kind: Literal["trains_all"] = "trains_all"

    def apply(self, plan):
        return plan.choose(self.label, "frozen", {row.name: {"frozen": False} for row in plan.rows})


class Unties(After):
    kind: Literal["unties"] = "unties"

    def describe(self):
        return "new weights"

    def finish(self, ending):
        for module in ending.model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(parameter.detach().clone()))
        return {}


class Untying(ctl.Strategy):
    kind: Literal["untying"] = "untying"

    def apply(self, plan):
        return plan.with_after(Unties(by=self.label))


class ReadsLayers(Term):
    """Takes each layer for granted."""

    kind: Literal["reads_layers"] = "reads_layers"

    def describe(self):
        return "features"

    def value(self, adapted, source, measured):
        return sum((adapted.features[name] - source.features[name]).square().mean() for name in self.taps)


class ReadsFirst(Term):
    """Compares the first output alone."""

    kind: Literal["reads_first"] = "reads_first"

    def describe(self):
        return "outputs"

    def value(self, adapted, source, measured):
        first = (
            logits_of(view.outputs) if isinstance(view.outputs, torch.Tensor) else view.outputs[0]
            for view in (adapted, source)
        )
        ours, theirs = first
        return (ours - theirs).square().mean()


class ReadsTensor(Term):
    """Takes outputs for one tensor."""

    kind: Literal["reads_tensor"] = "reads_tensor"

    def describe(self):
        return "outputs"

    def value(self, adapted, source, measured):
        return adapted.outputs.square().mean()


class Adding(ctl.Strategy):
    """Adds one of the terms."""

    kind: Literal["adding"] = "adding"
    which: str = ""
    """The term's kind."""

    def apply(self, plan):
        terms = {"reads_first": ReadsFirst, "reads_tensor": ReadsTensor}
        if self.which in terms:
            return plan.with_term(terms[self.which](by=self.label))
        layers = plan.layers[:-1] if self.which == "all_layers" else plan.layers[:1]
        return plan.with_term(ReadsLayers(by=self.label, taps=layers))


class Sign(Penalty):
    """A penalty that takes a gradient of the task for granted."""

    kind: Literal["sign"] = "sign"

    def describe(self):
        return "distance over the gradient's"

    def value(self, moving):
        return sum((m.parameter - m.anchor).square().sum() / m.parameter.grad.norm() for m in moving)


class NeedsGradients(ctl.Strategy):
    kind: Literal["needs_gradients"] = "needs_gradients"

    def apply(self, plan):
        names = tuple(row.name for row in plan.rows if row.origin == "source" and not row.frozen)
        return plan.with_penalty(Sign(by=self.label, names=names))


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (TrainsAll(), "asked for no gradient when the model was handed in, and is trained"),
        (Untying(), "tied weights are two tensors after training"),
        (Adding(which="all_layers"), "with a layer that does not run in a step it raises KeyError: 'dropped'"),
        (NeedsGradients(), "with frozen parts it raises AttributeError"),
        (Adding(which="reads_first"), "sees one of the model's two outputs"),
        (Adding(which="reads_tensor"), "with several outputs it raises AttributeError"),
        (Adding(which="first_layer"), "depends on the values of padding"),
    ],
    ids=lambda value: getattr(value, "which", "") or type(value).__name__ if isinstance(value, ctl.Strategy) else "",
)
def test_a_wrong_strategy_is_caught(strategy, message):
    with pytest.raises(AssertionError, match=message):
        check_situations(strategy)


def test_the_whole_contract_holds_them_to_it():
    with pytest.raises(AssertionError, match="tied weights are two tensors"):
        check_strategy(Untying())


@pytest.mark.parametrize(
    "strategy",
    [
        ctl.L2SP(on="all"),
        ctl.GradualUnfreezing(phases=[ctl.Stage(train=["fixed"], epochs=1), ctl.Stage()]),  # named: trained
        ctl.FeatureConservation(padding="count"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_right_one_passes(strategy):
    check_situations(strategy)


def test_generators_are_documented():
    found = doctest.testmod(situations)
    assert found.attempted
    assert not found.failed
