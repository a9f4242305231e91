"""The work of the host around a step: run by ``test_fused.py`` in a process in which programs act on the CPU."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

import conservtl as ctl
from conservtl.kernels.fused import launch


class Still(torch.optim.Optimizer):
    """An optimizer whose step does nothing."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    def step(self, closure=None):
        """Do nothing."""


METHODS = {
    "coupled": ([ctl.L2SP(on="all")], 1),
    "annealed": ([ctl.L2SP(on="all", anneal=ctl.Anneal(steps=10**6, end=0.5))], 1),
    "bf16": ([ctl.L2SP(on="all", anchors="bf16")], 1),
    "decoupled": ([ctl.L2SP(on="all", mode="decoupled")], 1),
    "l1": ([ctl.L1SP(on="all")], 1),
    "lasso": ([ctl.GroupLassoSP(on="all")], 2),
    "projection": ([ctl.Projection(on="all", relative=True)], 3),
    "selective": ([ctl.SelectiveDecay(on="all")], 5),
    "mixout": ([ctl.Mixout(on="all", p=0.5)], 2),
}


class Counter:
    """Counts calls of Python, those of C made from it, and launches of programs."""

    def __init__(self, monkeypatch):
        self.launches = self.calls = 0
        monkeypatch.setattr(launch, "call", self._launched)

    def _launched(self, *_):
        self.launches += 1

    def of(self, run):
        self.launches = self.calls = 0
        sys.setprofile(self._called)
        try:
            run()
        finally:
            sys.setprofile(None)
        return self.calls, self.launches

    def _called(self, _, event, __):
        self.calls += event in ("call", "c_call")


def step_of(strategies, layers):
    """Return a function that runs what an adaptation does before a forward pass and around a step."""
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(layers)))
    adaptation = ctl.adapt(model, model.state_dict(), strategies)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer = adaptation.optimizer(Still, lr=0.1)

    def run():
        adaptation.bound.before_forward(training=True)
        optimizer.step()

    for _ in range(3):
        run()
    return run


@pytest.mark.parametrize("name", METHODS)
def test_no_python_for_each_tensor(name, monkeypatch):
    """A step on 160 tensors makes the calls of one on 16: all go through lists and tables in one call each."""
    strategies, launches = METHODS[name]
    counter = Counter(monkeypatch)
    few, many = (counter.of(step_of(strategies, layers)) for layers in (8, 80))
    spare = 5 * 144 if name == "mixout" else 0  # its state holds entries for each parameter
    assert many[0] <= few[0] + 10 + spare
    assert few[0] < 260 + spare
    assert many[1] == launches


def test_the_rates_of_layers_take_three_launches(monkeypatch):
    """Auto-RGN between decisions: groups have rates of their own, but no tensor takes a call."""
    counter = Counter(monkeypatch)
    monkeypatch.setattr(ctl.AutoRGN.model_fields["every"], "default", 10)
    run = step_of([ctl.AutoRGN(every=10**6)], 20)
    groups = 2 * 20
    calls, launches = counter.of(run)
    assert launches == 3
    assert calls < 220 + 6 * groups


def test_a_rate_that_follows_a_schedule_sends_nothing(monkeypatch):
    """It goes to the program as a number, like the factor of an annealed pull; rates that differ are sent again."""
    sent = []
    monkeypatch.setattr("conservtl.kernels.fused.rates.uploaded", lambda values, *_: sent.append(values))
    Counter(monkeypatch)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    for strategies, times in (([], 1), ([ctl.DiscriminativeLR(decay=0.5)], 5)):
        sent.clear()
        adaptation = ctl.adapt(model, model.state_dict(), [ctl.L2SP(on="all", mode="decoupled"), *strategies])
        optimizer = adaptation.optimizer(Still, lr=0.1)
        for number in range(5):
            for group in optimizer.param_groups:
                group["lr"] *= 1 - number / 100
            optimizer.step()
        assert len(sent) == times
