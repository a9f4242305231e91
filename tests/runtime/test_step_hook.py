"""The pull inside a step: once, by name, on the optimizer it was made for."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.amp import GradScaler

import conservtl as ctl


def adapted(strategy=None):
    model = nn.Linear(2, 2, bias=False)
    strategy = ctl.L2SP(alpha=1.0) if strategy is None else strategy
    adaptation = ctl.adapt(model, {"weight": torch.zeros(2, 2)}, [strategy])
    nn.init.ones_(model.weight)
    return adaptation, adaptation.optimizer(torch.optim.SGD, lr=0.1)


def step(adaptation, optimizer):
    optimizer.zero_grad()
    (0 * adaptation.model.weight).sum().backward()
    optimizer.step()
    return adaptation.model.weight[0, 0].item()


def test_by_hand():
    adaptation, optimizer = adapted()
    assert step(adaptation, optimizer) == pytest.approx(0.9)
    assert step(adaptation, optimizer) == pytest.approx(0.81)


def test_a_step_without_gradients_is_pulled():
    adaptation, optimizer = adapted()
    optimizer.step()
    assert adaptation.model.weight[0, 0].item() == pytest.approx(0.9)


def test_a_copied_optimizer_has_no_hook():
    """torch drops it; the documents say so, and an adaptation makes another."""
    adaptation, optimizer = adapted()
    twin = copy.deepcopy(optimizer)
    twin.param_groups[0]["params"][0].grad = torch.zeros(2, 2)
    twin.step()
    assert twin.param_groups[0]["params"][0][0, 0].item() == 1.0
    assert step(adaptation, adaptation.optimizer(torch.optim.SGD, lr=0.1)) == pytest.approx(0.9)


def test_a_second_optimizer_pulls_for_itself():
    adaptation, first = adapted()
    second = adaptation.optimizer(torch.optim.SGD, lr=0.2)
    assert step(adaptation, second) == pytest.approx(0.8)
    assert step(adaptation, first) == pytest.approx(0.72)


def test_parameters_replaced_in_the_groups_are_pulled_by_name():
    """As Accelerate does when it prepares a model for FSDP2."""
    adaptation, optimizer = adapted()
    adaptation.model.weight = nn.Parameter(torch.full((2, 2), 2.0))
    optimizer.param_groups[0]["params"] = [adaptation.model.weight]
    assert step(adaptation, optimizer) == pytest.approx(1.8)


def test_a_model_moved_after_the_optimizer_was_made():
    adaptation, optimizer = adapted()
    adaptation.model.double()
    assert step(adaptation, optimizer) == pytest.approx(0.9)


@pytest.mark.parametrize("enabled", [True, False])
def test_a_scaler_that_is_off_is_as_none(enabled):
    adaptation, optimizer = adapted()
    scaler = GradScaler("cpu", enabled=enabled)
    scaler.scale((0 * adaptation.model.weight).sum()).backward()
    adaptation.pull(scaler)
    assert torch.equal(adaptation.model.weight.grad, torch.ones(2, 2))
    scaler.step(optimizer)
    assert adaptation.model.weight[0, 0].item() == pytest.approx(0.9)


def test_pull_in_a_step_that_is_given_up():
    """A loop that finds its loss to be NaN clears the gradients and goes on; the next pull is whole."""
    adaptation, optimizer = adapted()
    (0 * adaptation.model.weight).sum().backward()
    adaptation.pull()
    optimizer.zero_grad()
    (0 * adaptation.model.weight).sum().backward()
    adaptation.pull()
    assert torch.equal(adaptation.model.weight.grad, torch.ones(2, 2))
    optimizer.step()
    assert adaptation.model.weight[0, 0].item() == pytest.approx(0.9)


def test_gradients_replaced_after_the_pull_are_not_pulled_again():
    adaptation, optimizer = adapted()
    adaptation.pull()
    adaptation.model.weight.grad = adaptation.model.weight.grad / 2
    optimizer.step()
    assert adaptation.model.weight[0, 0].item() == pytest.approx(0.95)


def test_decoupled_leaves_the_gradients_and_the_optimizers_state_alone():
    adaptation, _ = adapted(ctl.L2SP(alpha=1.0, mode="decoupled"))
    optimizer = adaptation.optimizer(torch.optim.AdamW, lr=0.1)
    assert step(adaptation, optimizer) == pytest.approx(0.9)
    assert not adaptation.model.weight.grad.any()
    assert not optimizer.state[adaptation.model.weight]["exp_avg"].any()


class Network(nn.Module):
    """Three layers; the middle one has room for other memory formats."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 12)
        self.conv = nn.Conv2d(3, 3, 2)
        self.last = nn.Linear(3, 2)

    def forward(self, x):
        return self.last(self.conv(self.first(x).view(-1, 3, 2, 2)).flatten(1))


SOURCE = {name: 0.5 * tensor for name, tensor in Network().state_dict().items()}
DATA = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
STACKS = {
    "coupled": [ctl.L2SP(alpha=0.5, beta=0.1)],
    "annealed": [ctl.L2SP(alpha=0.5, anneal=ctl.Anneal(steps=4))],
    "decoupled": [ctl.L2SP(alpha=0.5, mode="decoupled"), ctl.DiscriminativeLR(decay=0.5)],
    "bf16": [ctl.L2SP(alpha=0.5, mode="decoupled", anchors="bf16")],
    "cpu": [ctl.L2SP(alpha=0.5, anchors="cpu")],
    "update": [ctl.L2SP(alpha=0.5), ctl.Mixout(p=0.5)],
}


class Twin:
    """One of two adaptations to which the same happens."""

    def __init__(self, stack, forgets):
        torch.manual_seed(0)
        self.model = Network()
        phases = ctl.GradualUnfreezing(by="layer", scales=(1.0, 0.5))
        self.adaptation = ctl.adapt(self.model, SOURCE, [*STACKS[stack], phases], fresh=["last"])
        self.forgets = forgets
        self.scheduled = 0
        self.make()

    def make(self):
        self.optimizer = self.adaptation.optimizer(torch.optim.SGD, lr=0.1)
        index = self.adaptation.bound.hook.index
        refresh = index._refresh

        def forget():
            index._seen = ([], [], [])
            refresh()

        if self.forgets:
            index._refresh = forget

    def step(self, gradients=True):
        self.optimizer.zero_grad()
        if gradients:
            x = DATA.to(self.model.first.weight.dtype)
            self.model(x).square().mean().backward()
        self.optimizer.step()

    def replace(self, more=1):
        """As Accelerate does when it prepares for FSDP2; with nothing more, on the same memory."""
        weight = self.model.conv.weight.detach()
        self.model.conv.weight = nn.Parameter(weight + more if more else weight)
        parameters = dict(self.model.named_parameters())
        for group in self.optimizer.param_groups:
            names = group["param_names"]
            group["params"] = [parameters.get(name, old) for name, old in zip(names, group["params"], strict=True)]
        self.adaptation.keep_frozen()

    def hold(self):
        """As under DDP, where what a phase freezes goes on receiving gradients, which are dropped."""
        for parameter in self.model.parameters():
            parameter.requires_grad_()
        self.step()
        self.adaptation.start_phase(0)
        for parameter in self.model.parameters():
            parameter.requires_grad_()

    def swap(self):
        """As an average of weights does."""
        self.model.conv.weight.data = self.model.conv.weight.data * 0.5

    def other_start(self):
        state = self.adaptation.state_dict()
        state["start"] = {name: tensor + 1 for name, tensor in state["start"].items()}
        self.adaptation.load_state_dict(state)

    def rates(self):
        self.scheduled += 1
        for group in self.optimizer.param_groups:
            group["lr"] = group.get("initial_lr", 0.1) / self.scheduled

    def toggle(self):
        bias = self.model.last.weight
        bias.requires_grad_(not bias.requires_grad)

    def more(self):
        self.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "param_names": ["own"]})

    def reload(self):
        state = copy.deepcopy(self.optimizer.state_dict())
        for group in state["param_groups"]:
            group["lr"] = group["lr"] / 3
        self.optimizer.load_state_dict(state)


HAPPENINGS = {
    "nothing": lambda _: None,
    "no gradients": lambda twin: twin.step(gradients=False),
    "first phase": lambda twin: twin.adaptation.start_phase(0),
    "first phase, gradients kept": Twin.hold,
    "last phase": lambda twin: twin.adaptation.start_phase(len(twin.adaptation.plan.phases) - 1),
    "rates": Twin.rates,
    "parameters replaced": Twin.replace,
    "parameters replaced on the same memory": lambda twin: twin.replace(0),
    "data swapped": Twin.swap,
    "trained or not, by the user": Twin.toggle,
    "a group more": Twin.more,
    "optimizer's state loaded": Twin.reload,
    "adaptation's state loaded": Twin.other_start,
    "a new optimizer": Twin.make,
    "another type": lambda twin: twin.model.to(
        torch.float64 if twin.model.first.weight.dtype == torch.float32 else torch.float32
    ),
    "another layout": lambda twin: twin.model.to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("stack", STACKS)
@settings(max_examples=12, deadline=None)
@given(happenings=st.lists(st.sampled_from(sorted(HAPPENINGS)), min_size=1, max_size=6))
@example(happenings=["last phase", "rates", "rates"])
@example(happenings=["last phase", "nothing", "adaptation's state loaded"])
@example(happenings=["last phase", "trained or not, by the user", "first phase"])
@example(happenings=["last phase", "parameters replaced", "another type", "another layout"])
@example(happenings=["last phase", "first phase, gradients kept"])
@example(happenings=["last phase", "parameters replaced on the same memory"])
@example(happenings=["last phase", "data swapped", "optimizer's state loaded", "a group more"])
def test_what_is_kept_between_steps_is_never_stale(stack, happenings):
    """Whatever happens between steps, each is bit for bit that of a hook that sorts everything anew."""
    keeps, forgets = Twin(stack, forgets=False), Twin(stack, forgets=True)
    for happening in happenings:
        for twin in (keeps, forgets):
            HAPPENINGS[happening](twin)
            twin.step()
        for (name, ours), theirs in zip(keeps.model.named_parameters(), forgets.model.parameters(), strict=True):
            assert torch.equal(ours, theirs), (happening, name)


def test_an_older_optimizer_pulls_to_anchors_that_were_loaded_since():
    adaptation, older = adapted()
    older.step()
    adaptation.optimizer(torch.optim.SGD, lr=0.1)
    state = adaptation.state_dict()
    adaptation.load_state_dict({**state, "start": {"weight": torch.full((2, 2), 0.9)}})
    older.zero_grad()
    older.step()
    assert adaptation.model.weight[0, 0].item() == pytest.approx(0.9)


def test_an_importance_that_is_loaded_between_steps_weighs_the_next():
    model = nn.Linear(2, 2, bias=False)
    adaptation = ctl.adapt(model, {"weight": torch.zeros(2, 2)}, [ctl.FisherSP(alpha=1.0)])
    nn.init.ones_(model.weight)
    (name,) = (one.name for one in adaptation.outstanding())
    adaptation.use_measured(name, {"weight": torch.ones(2, 2)})
    optimizer = adaptation.optimizer(torch.optim.SGD, lr=0.1)
    assert step(adaptation, optimizer) == pytest.approx(0.9)
    adaptation.use_measured(name, {"weight": torch.zeros(2, 2)})
    assert step(adaptation, optimizer) == pytest.approx(0.9)


def test_steps_in_which_nothing_changed_sort_nothing(monkeypatch):
    """Nor do rates that follow a schedule."""
    adaptation, optimizer = adapted(ctl.L2SP(alpha=1.0, mode="decoupled"))
    optimizer.step()
    monkeypatch.setattr(adaptation.bound.anchors, "of", None)
    optimizer.param_groups[0]["lr"] = 0.5
    optimizer.step()
    assert adaptation.model.weight[0, 0].item() == pytest.approx(0.45)


def test_anchors_on_the_cpu_are_not_kept_for_updates():
    """They would stay on the device."""
    adaptation = Twin("cpu", forgets=False).adaptation
    adaptation.start_phase(len(adaptation.plan.phases) - 1)
    index = adaptation.bound.hook.index
    update = ctl.Mixout(p=0.5).apply(adaptation.plan).updates[0]
    assert index.moving(update)
    assert index._moving == {}


@pytest.mark.parametrize("nesterov", [False, True])
def test_a_fused_sgd_takes_parameters_that_are_trained_later(nesterov):
    """torch's own fused step takes a group in which all have a momentum, or none: the second phase would stop there."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    models = [copy.deepcopy(model) for _ in range(2)]
    inputs = torch.randn(8, 4)
    for one, fused in zip(models, (False, True), strict=True):
        adaptation = ctl.adapt(one, copy.deepcopy(model), [ctl.LPFT(epochs=1)])
        optimizer = adaptation.optimizer(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=nesterov, fused=fused)
        for phase in (0, 0, 1, 1, 1):
            if phase != adaptation.phase:
                adaptation.start_phase(phase)
            one(inputs).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b)
