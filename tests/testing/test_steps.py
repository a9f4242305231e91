"""Steps of the contract for models that have little to train, or examples that are no batch."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import conservtl as ctl
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
