"""``adaptation.scheduler``: any scheduler of torch, with the plan's ratios, over phases."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import conservtl as ctl

RATIOS = [0.25, 0.5, 1.0]


def adapted(*strategies):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(3)))
    return ctl.adapt(model, copy.deepcopy(model), [ctl.DiscriminativeLR(decay=0.5), *strategies])


def run(scheduler, optimizer, steps, *args):
    rates = [[group["lr"] for group in optimizer.param_groups]]
    for _ in range(steps):
        optimizer.step()
        scheduler.step(*args)
        rates.append([group["lr"] for group in optimizer.param_groups])
    return rates


SCHEDULERS = {
    "one cycle": (lr_scheduler.OneCycleLR, {"max_lr": 0.3, "total_steps": 12}),
    "cyclic": (lr_scheduler.CyclicLR, {"base_lr": 0.01, "max_lr": 0.3, "step_size_up": 3, "cycle_momentum": False}),
    "cosine with a bound": (lr_scheduler.CosineAnnealingLR, {"T_max": 12, "eta_min": 0.02}),
    "restarts": (lr_scheduler.CosineAnnealingWarmRestarts, {"T_0": 5, "eta_min": 0.02}),
    "lambda": (lr_scheduler.LambdaLR, {"lr_lambda": lambda step: 1 / (step + 1)}),
    "steps": (lr_scheduler.StepLR, {"step_size": 4}),
    "polynomial": (lr_scheduler.PolynomialLR, {"total_iters": 9, "power": 2.0}),
    "a function": (
        lambda optimizer, warm: lr_scheduler.SequentialLR(
            optimizer,
            [lr_scheduler.LinearLR(optimizer, 0.1, total_iters=warm), lr_scheduler.ExponentialLR(optimizer, 0.9)],
            [warm],
        ),
        {"warm": 4},
    ),
}


@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step:UserWarning")  # by torch's SequentialLR
@pytest.mark.parametrize(("cls", "options"), SCHEDULERS.values(), ids=SCHEDULERS)
def test_every_group_keeps_its_ratio(cls, options):
    """Against torch's own scheduler on an optimizer with one group at the full rate."""
    adaptation = adapted()
    optimizer = adaptation.optimizer(torch.optim.SGD, lr=0.1, momentum=0.9)
    alone = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1, momentum=0.9)
    theirs, ours = cls(alone, **options), adaptation.scheduler(cls, **options)
    expected = run(theirs, alone, 10)
    for found, (rate,) in zip(run(ours, optimizer, 10), expected, strict=True):
        assert found == pytest.approx([ratio * rate for ratio in RATIOS])
    assert ours.get_last_lr() == [group["lr"] for group in optimizer.param_groups]
    assert isinstance(ours, lr_scheduler.LRScheduler)


def test_what_a_cycle_does_to_momentum():
    adaptation = adapted()
    options = {"max_lr": 0.3, "total_steps": 12, "base_momentum": 0.7, "max_momentum": 0.95}
    for cls, fields, read in (
        (torch.optim.SGD, {"momentum": 0.9}, lambda group: group["momentum"]),
        (torch.optim.AdamW, {}, lambda group: group["betas"][0]),
    ):
        optimizer = adaptation.optimizer(cls, lr=0.1, **fields)
        alone = cls([nn.Parameter(torch.zeros(1))], lr=0.1, **fields)
        theirs = lr_scheduler.OneCycleLR(alone, **options)
        ours = adaptation.scheduler(lr_scheduler.OneCycleLR, **options)
        for _ in range(7):
            assert {read(group) for group in optimizer.param_groups} == {read(alone.param_groups[0])}
            run(theirs, alone, 1)
            run(ours, optimizer, 1)


def test_it_goes_on_over_phases():
    """lr = ratio × scale of the phase × the cycle's rate at that step, computed by hand."""
    adaptation = adapted(ctl.GradualUnfreezing(scales=(0.5, 2.0)))
    optimizer = adaptation.optimizer(torch.optim.SGD, lr=0.1)
    scheduler = adaptation.scheduler(lr_scheduler.CosineAnnealingLR, T_max=8, eta_min=0.02)
    for step in range(8):
        if step == 3:
            adaptation.start_phase(1)
        rate = 0.02 + 0.08 * (1 + math.cos(math.pi * step / 8)) / 2
        scale = 0.5 if step < 3 else 2.0
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([r * scale * rate for r in RATIOS])
        run(scheduler, optimizer, 1)


def test_a_plateau_takes_its_metric():
    adaptation = adapted()
    optimizer = adaptation.optimizer(torch.optim.SGD, lr=0.1)
    scheduler = adaptation.scheduler(lr_scheduler.ReduceLROnPlateau, "max", factor=0.1, patience=0)
    assert run(scheduler, optimizer, 2, 0.5)[-1] == pytest.approx([0.01 * ratio for ratio in RATIOS])


def test_rates_that_are_absolute_follow_the_schedule():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    adaptation = ctl.adapt(model, copy.deepcopy(model), [ctl.DiscriminativeLR(source=1e-3, fresh=1e-2)], fresh=["1"])
    optimizer = adaptation.optimizer(torch.optim.SGD, lr=0.5)
    scheduler = adaptation.scheduler(lr_scheduler.LinearLR, start_factor=0.5, total_iters=2)
    assert run(scheduler, optimizer, 2) == [pytest.approx([share * 1e-3, share * 1e-2]) for share in (0.5, 0.75, 1.0)]


def test_a_state_goes_on_where_it_was_saved():
    options = {"max_lr": 0.3, "total_steps": 12}
    first, second = adapted(), adapted()
    optimizers = [one.optimizer(torch.optim.SGD, lr=0.1, momentum=0.9) for one in (first, second)]
    schedulers = [one.scheduler(lr_scheduler.OneCycleLR, **options) for one in (first, second)]
    run(schedulers[0], optimizers[0], 5)
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    schedulers[1].load_state_dict(pickle.loads(pickle.dumps(schedulers[0].state_dict())))
    assert schedulers[1].last_epoch == schedulers[0].last_epoch == 5
    assert run(schedulers[1], optimizers[1], 6) == run(schedulers[0], optimizers[0], 6)


def test_rates_in_tensors_stay_the_same_tensors():
    adaptation = adapted()
    optimizer = adaptation.optimizer(torch.optim.SGD, lr=0.1)
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(group["lr"])
    before = [group["lr"] for group in optimizer.param_groups]
    scheduler = adaptation.scheduler(lr_scheduler.ExponentialLR, gamma=0.5)
    run(scheduler, optimizer, 1)
    assert all(rate is group["lr"] for rate, group in zip(before, optimizer.param_groups, strict=True))
    assert [float(rate) for rate in before] == pytest.approx([0.05 * ratio for ratio in RATIOS])


def test_what_is_no_scheduler_class_is_refused():
    adaptation = adapted()
    with pytest.raises(ctl.SpecError, match="make that optimizer first"):
        adaptation.scheduler(lr_scheduler.StepLR, step_size=1)
    optimizer = adaptation.optimizer(torch.optim.SGD, lr=0.1)
    with pytest.raises(ctl.SpecError, match=r"pass the class and its arguments.*received an instance of StepLR"):
        adaptation.scheduler(lr_scheduler.StepLR(optimizer, 1))
    with pytest.raises(ValueError, match="max_lr has 3 values, param_groups has 1"):
        adaptation.scheduler(lr_scheduler.OneCycleLR, max_lr=[0.1, 0.2, 0.3], total_steps=5)


class Halves:
    """A scheduler of no class of torch's, which counts no epochs."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def step(self):
        for group in self.optimizer.param_groups:
            group["lr"] /= 2


def test_steps_of_a_scheduler_that_does_not_count_them():
    optimizer = (adaptation := adapted()).optimizer(torch.optim.SGD, lr=0.1)
    scheduler = adaptation.scheduler(Halves)
    assert scheduler.last_epoch == 0
    found = run(scheduler, optimizer, 2)
    assert found == [pytest.approx([0.1 * ratio / 2**step for ratio in RATIOS]) for step in range(3)]
    assert (scheduler.last_epoch, scheduler.get_last_lr()) == (2, found[-1])


@pytest.mark.parametrize(
    "extra",
    [
        pytest.param(lambda head: head, id="a module"),
        pytest.param(lambda head: head.parameters(), id="parameters"),
        pytest.param(lambda head: [{"params": head.parameters(), "lr": 0.1}], id="a group"),
    ],
)
def test_parameters_outside_the_model_have_groups_that_schedules_and_phases_scale(extra):
    """Its parameter has the model's name and shape: no strategy acts on it all the same."""
    torch.manual_seed(0)
    model, head = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)), nn.Linear(2, 2, bias=False)
    phases = ctl.GradualUnfreezing(epochs=1, scales=(1.0, 0.5))
    adaptation = ctl.adapt(model, copy.deepcopy(model), [ctl.L2SP(alpha=10.0), phases], fresh=["1"])
    optimizer = adaptation.optimizer(torch.optim.SGD, lr=0.1, extra=extra(head))
    scheduler = adaptation.scheduler(lr_scheduler.LambdaLR, lr_lambda=lambda step: 1 / (1 + step))
    before = head.weight.detach().clone()
    (head.weight.sum() + model(torch.ones(1, 2)).sum()).backward()
    optimizer.step()
    assert torch.allclose(head.weight, before - 0.1, atol=1e-7)
    scheduler.step()
    assert optimizer.param_groups[-1]["lr"] == pytest.approx(0.05)
    adaptation.start_phase(1)
    scheduler.step()
    assert optimizer.param_groups[-1]["lr"] == pytest.approx(0.1 / 3 * 0.5)


def test_a_group_added_by_hand_is_scheduled_from_its_own_rate():
    """Names of the group are those of the model's layers, and the weights are not pulled for it."""
    adaptation = adapted(ctl.L2SP(alpha=1.0))
    optimizer = adaptation.optimizer(torch.optim.SGD, lr=0.1)
    head = nn.Sequential(nn.Linear(2, 2, bias=False))
    optimizer.add_param_group({"params": head.named_parameters(), "lr": 0.3})
    scheduler = adaptation.scheduler(lr_scheduler.StepLR, step_size=1, gamma=0.5)
    before = head[0].weight.detach().clone()
    head(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    scheduler.step()
    assert torch.allclose(head[0].weight, before - 0.3, atol=1e-7)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.0125, 0.025, 0.05, 0.15])


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (lambda model: model, "is a parameter of the model"),
        (lambda _: [], "received none"),
        (lambda _: 3, "received int"),
        (lambda _: ["fc"], "received str"),
    ],
)
def test_extra_that_is_none_is_refused(extra, message):
    adaptation = adapted()
    with pytest.raises(ctl.SpecError, match=message):
        adaptation.optimizer(torch.optim.SGD, lr=0.1, extra=extra(adaptation.model))
