"""``fit`` takes any optimizer class: the steps of a loop by hand with it, and what contradicts the settings."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch

import conservtl as ctl
from conservtl.engine.optimizer import choose_optimizer


class Lion(torch.optim.Optimizer):
    """A user's optimizer: the sign of an average of gradients."""

    def __init__(self, params, lr=1e-4, beta=0.9):
        super().__init__(params, {"lr": lr, "beta": beta})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    mean = self.state[parameter].setdefault("mean", torch.zeros_like(parameter))
                    mean.lerp_(parameter.grad, 1 - group["beta"])
                    parameter.sub_(mean.sign(), alpha=group["lr"])


class Whole(torch.optim.SGD):
    """An optimizer that steps with a closure only."""

    def step(self, closure):
        return super().step(closure)


@pytest.mark.parametrize(
    ("given", "by_hand"),
    [
        (torch.optim.RMSprop, partial(torch.optim.RMSprop, lr=0.01)),
        (
            partial(torch.optim.SGD, nesterov=True, momentum=0.8),
            partial(torch.optim.SGD, lr=0.01, momentum=0.8, nesterov=True),
        ),
        (Lion, partial(Lion, lr=0.01)),
        (partial(Lion, beta=0.5), partial(Lion, lr=0.01, beta=0.5)),
    ],
)
def test_the_steps_of_a_loop_by_hand(plain, data, hand, same, given, by_hand):
    adaptation = plain()
    model = copy.deepcopy(adaptation.model)
    torch.manual_seed(3)
    epoch = lambda: ((data[0][i], data[1][i]) for i in torch.randperm(50).split(16))  # noqa: E731
    hand(model, by_hand(model.parameters()), epoch, 2)
    ctl.fit(adaptation, data, training=ctl.Training(epochs=2, batch_size=16, lr=0.01), optimizer=given, seed=3)
    assert same(adaptation.model, model)


def test_a_run_goes_on_with_its_optimizer_only(plain, data, tmp_path):
    training = ctl.Training(epochs=2, lr=0.01)
    ctl.fit(plain(), data, training=training, optimizer=Lion, out=tmp_path, seed=0)
    for other, name in ((None, "torch.optim.adamw.AdamW"), (torch.optim.RMSprop, "torch.optim.rmsprop.RMSprop")):
        with pytest.raises(ctl.SpecError, match=rf"optimizer .*Lion, but now it is {name}"):
            ctl.fit(plain(), data, training=training, optimizer=other, out=tmp_path, resume=True)
    ctl.fit(plain(), data, training=training, optimizer=partial(Lion), out=tmp_path, resume=True)


def test_trials_of_a_search_use_it(plain, data):
    made = []

    def counted(params, **options):
        made.append(options)
        return torch.optim.SGD(params, **options)

    adaptation = plain(ctl.SurgicalFineTuning(block="best"))
    blocks = ctl.best_block(adaptation, data, {"target": data}, ctl.Training(epochs=1, lr=0.01), optimizer=counted)
    assert len(made) == len(blocks)
    assert made[0] == {"lr": 0.01}


@pytest.mark.parametrize(
    ("training", "given", "expected"),
    [
        ({"optimizer": "sgd"}, Lion, "Lion and training.optimizer='sgd' both name the optimizer"),
        ({}, partial(Lion, lr=0.1), "lr is training.lr; the partial of .*Lion has it too \\(0.1\\)"),
        ({"weight_decay": 0.1}, Lion, "training.weight_decay is for the optimizer, but .*Lion takes no weight_decay"),
        ({"fused": True}, Lion, "Lion takes no fused"),
        ({}, Whole, "Whole steps with a closure only"),
        ({}, "lion", "must be a class, .* received builtins.str object"),
        ({}, Lion([torch.zeros(1, requires_grad=True)]), "received .*Lion object"),
    ],
)
def test_contradictions_are_refused(plain, data, training, given, expected):
    with pytest.raises(ctl.SpecError, match=expected):
        ctl.fit(plain(), data, training=ctl.Training(**training), optimizer=given)


def test_an_optimizer_without_groups_is_refused_before_training(plain, data):
    adaptation = plain()
    before = copy.deepcopy(adaptation.model.state_dict())
    with pytest.raises(ctl.SpecError, match="LBFGS"):
        ctl.fit(adaptation, data, optimizer=torch.optim.LBFGS)
    assert all(torch.equal(tensor, before[name]) for name, tensor in adaptation.model.state_dict().items())


def test_settings_name_it_without_a_class():
    assert choose_optimizer(ctl.Training(optimizer="sgd", lr=0.5), None) == (
        torch.optim.SGD,
        {"lr": 0.5, "momentum": 0.9},
    )


def test_a_recipes_optimizer_may_be_replaced(net, data):
    adaptation = ctl.adapt(net(0), net(1), ctl.recipe("vision"))
    made = []

    def counted(params, **options):
        made.append(options)
        return torch.optim.SGD(params, **options)

    ctl.fit(adaptation, data, {"target": data, "source": data}, optimizer=counted)
    assert made == [{"lr": adaptation.training.lr}]
