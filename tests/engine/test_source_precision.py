"""The source's weights in the half precision of the run: the same results, and the weights are back afterwards."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import conservtl as ctl

DATA = torch.randn(12, 3, 6, 6, generator=torch.Generator().manual_seed(1)), torch.arange(12) % 3


def network(tied=False):
    torch.manual_seed(0)
    last, again = nn.Linear(4, 4), nn.Linear(4, 4)
    if tied:
        again.weight = last.weight
    body = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*body, last, nn.ReLU(), again, nn.Linear(4, 3))


def trained(source_precision, precision="bf16", strategy=None, tied=False, classes=3):
    """Return the weights, and the types of the source's parameters while it ran and afterwards."""
    model, source = network(tied), network(tied)
    if classes != 3:
        model[-1] = nn.Linear(4, classes)
    adaptation = ctl.adapt(model, source, [strategy or ctl.OutputConservation()])
    runner, types = adaptation.origin.source_model, []
    runner.register_forward_hook(lambda *_: types.append([parameter.dtype for parameter in runner.parameters()]))
    values = [parameter.detach().clone() for parameter in runner.parameters()]
    settings = {"epochs": 2, "batch_size": 4, "lr": 1e-2, "precision": precision, "hold": "never", "device": "cpu"}
    training = ctl.Training(source_precision=source_precision, **settings)
    data = DATA[0], DATA[1] % classes
    ctl.fit(adaptation, data, training=training, seed=0)
    assert all(map(torch.equal, runner.parameters(), values))
    return [parameter.detach() for parameter in model.parameters()], types


@pytest.mark.parametrize("strategy", [ctl.OutputConservation(), ctl.FeatureConservation(layers=2)], ids=str)
def test_results_are_the_same(strategy):
    half, types = trained("half", strategy=strategy)
    plain, before = trained("fp32", strategy=strategy)
    assert all(map(torch.equal, half, plain))
    single, bf16 = torch.float32, torch.bfloat16
    assert types[0] == [bf16, bf16, single, single, bf16, bf16, bf16, bf16, single, single]  # norms and head stay
    assert set(before[0]) == {single}


def test_labels_of_its_own_take_the_head_outside_the_body():
    half, _ = trained("half", classes=2)
    plain, _ = trained("fp32", classes=2)
    assert all(map(torch.equal, half, plain))


def test_tied_weights_and_runs_in_full_precision_stay():
    _, types = trained("half", tied=True)
    assert types[0][4] is torch.float32
    assert types[0].count(torch.bfloat16) == 4  # the convolution's, and two biases
    _, types = trained("half", precision="fp32")
    assert set(types[0]) == {torch.float32}


@pytest.mark.parametrize(
    ("precision", "strategy", "said"),
    [
        ("fp32", ctl.OutputConservation(), "source_precision half unused: the run computes in fp32"),
        ("bf16", ctl.L2SP(), "source_precision half unused: no strategy runs the source model"),
        ("bf16", ctl.OutputConservation(), ""),
    ],
)
def test_a_run_says_where_half_changes_nothing(precision, strategy, said):
    settings = {"epochs": 1, "batch_size": 12, "precision": precision, "device": "cpu", "source_precision": "half"}
    found = ctl.fit(ctl.adapt(network(), network(), [strategy]), DATA, training=ctl.Training(**settings))
    assert found.execution.endswith(said)
    assert ("source_precision" in found.execution) == bool(said)
