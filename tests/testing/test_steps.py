"""Steps of the contract for models that have little to train, or examples that are no batch."""

from types import SimpleNamespace
from typing import Literal

import pytest
import torch
from torch import nn

import conservtl as ctl
from conservtl.plan.term import Term
from conservtl.testing._cases import cases
from conservtl.testing._training_checks import law_case
from conservtl.testing.steps import backward, doubled, objective, outputs_of


def adapted(*strategies):
    return ctl.adapt(nn.Sequential(nn.Linear(3, 2)), ctl.itself(missing=[]), strategies)


def test_terms_without_an_example_have_no_loss():
    assert objective(SimpleNamespace(model=nn.Linear(1, 1), plan=SimpleNamespace(terms=("a term",))), None) == 0


def test_a_frozen_model_has_a_loss_without_gradients():
    adaptation, x = adapted(), torch.ones(4, 3)
    adaptation.model.requires_grad_(False)
    assert float(objective(adaptation, x)) == pytest.approx(float(adaptation.model(x).square().mean()))
    backward(adaptation, x, 0)
    assert adaptation.model[0].weight.grad is None


@pytest.mark.parametrize(
    ("example", "twice"), [(torch.ones(4, 3), True), ((torch.ones(4, 3), torch.tensor(1.0)), False)]
)
def test_only_rows_of_a_batch_are_doubled(example, twice):
    class Scaled(nn.Module):
        def forward(self, x, scale=1.0):
            return x * scale

    assert (doubled(Scaled(), example) is not None) == twice
    assert outputs_of(Scaled(), None) == []


class Detached(Term):
    """The distance of a layer's features to zero, without a gradient unless ``acts``."""

    kind: Literal["tests.detached"] = "tests.detached"
    acts: bool
    """Whether gradients reach the features."""

    def describe(self):
        return "features toward zero"

    def value(self, adapted, source, measured):
        features = adapted.features[self.taps[0]]
        return (features if self.acts else features.detach()).square().mean()


class Toward(ctl.Strategy):
    kind: Literal["tests.toward"] = "tests.toward"
    acts: bool
    """Whether gradients reach the features."""

    def apply(self, plan):
        return plan.with_term(Detached(by=self.label, taps=plan.layers[:1], acts=self.acts))


def test_a_term_without_a_gradient_is_found():
    case = next(cases(None, None, None))
    assert law_case(Toward(acts=True), case) is not None
    with pytest.raises(AssertionError, match="the value of its term has no gradient"):
        law_case(Toward(acts=False), case)


@pytest.mark.parametrize(
    ("strategy", "note"),
    [
        (ctl.L2SP(), "L2SP acts on nothing: all parameters that its l2_sp covers are frozen"),
        (ctl.Mixout(p=0.5), "Mixout acts on nothing: all parameters that its mixout covers are frozen"),
        (ctl.FeatureConservation(), "FeatureConservation adds nothing: no layer up to those that it compares is"),
    ],
)
def test_what_acts_on_frozen_layers_alone_is_noted(strategy, note):
    def plan(*strategies):
        source, model = (nn.Sequential(nn.Linear(3, 3), nn.Linear(3, classes)) for classes in (5, 2))
        return str(ctl.adapt(model, source, strategies).plan)

    assert note in plan(ctl.FeatureExtraction(), strategy)
    assert "nothing" not in plan(strategy)
