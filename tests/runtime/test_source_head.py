"""The source's head on features of the adapted body: its precision, and its place in a model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import conservtl as ctl
from conservtl.runtime.source_model import SourceHead


@pytest.mark.parametrize(
    ("entering", "head", "given"),
    [
        (torch.float32, torch.float32, torch.float32),
        (torch.bfloat16, torch.float32, torch.bfloat16),  # a pass under autocast is over
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.float64, torch.float64, torch.float64),
    ],
)
def test_outputs_are_in_the_precision_of_the_features(entering, head, given):
    source = nn.Sequential(nn.Linear(2, 3)).to(head)
    features = torch.ones(4, 2, dtype=entering, requires_grad=True)
    outputs = SourceHead(source, "0").outputs(features)
    assert outputs.dtype == given
    outputs.sum().backward()
    torch.testing.assert_close(
        features.grad.float(), source[0].weight.float().sum(0).expand(4, 2), rtol=1e-2, atol=1e-2
    )


def test_a_head_without_parameters_has_no_precision():
    assert SourceHead(nn.Sequential(nn.Identity()), "0").outputs(torch.ones(2, dtype=torch.bfloat16)).tolist() == [1, 1]


def test_the_place_of_the_models_own_head_is_lent():
    source = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 3)))
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 5)))
    own, head = model[1][0], SourceHead(source, "1.0")
    for wrapped in (model, nn.DataParallel(model)):
        with head.replacing(wrapped) as bare:
            assert bare is model
            assert torch.equal(model[1][0].weight, source[1][0].weight)
            assert model[1][0] is not source[1][0]
            lent = model[1][0]
        assert model[1][0] is own
    with head.replacing(model):
        assert model[1][0] is lent  # copied once for a device
    with pytest.raises(RuntimeError, match="inside"), head.replacing(model):
        raise RuntimeError("inside")
    assert model[1][0] is own


class Skips(nn.Module):
    """A model whose head can be left out."""

    def __init__(self, classes):
        super().__init__()
        self.body, self.head, self.skips = nn.Linear(2, 4), nn.Linear(4, classes), False

    def forward(self, x):
        return self.body(x) if self.skips else self.head(self.body(x))


def test_a_head_that_did_not_run_is_named():
    x = torch.ones(3, 2)
    adaptation = ctl.adapt(Skips(5), Skips(3), [ctl.OutputConservation()], example=x)
    adaptation.model.skips = True
    outputs = adaptation.model(x)
    loss = nn.functional.cross_entropy(outputs, torch.zeros(3, dtype=torch.long))
    with pytest.raises(ctl.SpecError, match="the head 'head' must run in each forward pass; it did not"):
        adaptation.loss(loss, outputs, x)
