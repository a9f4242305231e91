"""The laws of a step find a strategy that breaks them, and say which."""

from __future__ import annotations

from typing import ClassVar, Literal

import pytest
import torch

import conservtl as ctl
from conservtl.plan import Decision, Penalty, Term, Update
from conservtl.runtime.step_hook import StepHook
from conservtl.testing import check_strategy

NUMBERS = []


def pull_of(item):
    """Gradient of the Huber penalty with a corner at 0.05."""
    return 0.5 * (item.parameter - item.anchor).clamp(-0.05, 0.05)


class Acts(ctl.Strategy):
    """Puts one decision on what came from the source into the plan."""

    kind: Literal["acts"] = "acts"
    decision: str
    """Its kind."""

    @property
    def label(self):
        return Decision.kinds[self.decision].__name__

    def apply(self, plan):
        cls = Decision.kinds[self.decision]
        if issubclass(cls, Term):
            return plan.with_term(cls(by=self.label))
        one = cls(by=self.label, names=tuple(row.name for row in plan.rows if row.origin == "source"))
        return plan.with_penalty(one) if isinstance(one, Penalty) else plan.with_update(one)


def acting(cls):
    """A strategy that decides one thing."""
    return Acts(decision=cls.model_fields["kind"].default)


class Rightly(Update):
    """The Huber penalty with all that an update of one's own must heed."""

    kind: Literal["law_rightly"] = "law_rightly"

    def describe(self):
        return "a Huber penalty"

    def pull(self, item, step):
        gradient = pull_of(item) * (1 if step.scale is None else step.scale)
        return -gradient if item.group.get("maximize") else gradient

    def gradients(self, step, state):
        for item in step.moving:
            if item.parameter.grad is None:
                item.parameter.grad = torch.zeros_like(item.parameter)
            item.parameter.grad.add_(self.pull(item, step))


class IgnoresTheScale(Rightly):
    kind: Literal["law_scale"] = "law_scale"

    def pull(self, item, step):
        return -pull_of(item) if item.group.get("maximize") else pull_of(item)


class ForgetsMissingGradients(Rightly):
    kind: Literal["law_none"] = "law_none"

    def gradients(self, step, state):
        for item in step.moving:
            item.parameter.grad.add_(self.pull(item, step))


class PassesOverMissingGradients(Rightly):
    kind: Literal["law_passes"] = "law_passes"

    def gradients(self, step, state):
        for item in step.moving:
            if item.parameter.grad is not None:
                item.parameter.grad.add_(self.pull(item, step))


class IgnoresTheSign(Rightly):
    kind: Literal["law_sign"] = "law_sign"

    def pull(self, item, step):
        return pull_of(item) * (1 if step.scale is None else step.scale)


class ActsOnceAForwardPass(Rightly):
    kind: Literal["law_accumulation"] = "law_accumulation"
    forward: ClassVar[bool] = True

    def prepare(self, step, state, training):
        state["passes"] = state.get("passes", torch.zeros(())) + 1

    def pull(self, item, step):
        return super().pull(item, step)

    def gradients(self, step, state):
        for _ in range(int(state.pop("passes", torch.zeros(())))):
            super().gradients(step, state)


class RemembersElsewhere(Rightly):
    """Counts its steps in a place that no state dict holds."""

    kind: Literal["law_resuming"] = "law_resuming"

    def after(self, step, state):
        NUMBERS.append(step.number)
        for item in step.moving:
            item.parameter.mul_(1 - 1e-3 * (len(NUMBERS) % 7))


class SumsOverTheBatch(Term):
    kind: Literal["law_batch"] = "law_batch"
    source: ClassVar[bool] = False

    def describe(self):
        return "a sum of outputs"

    def value(self, adapted, source, measured):
        return adapted.outputs.square().sum()


class Huber(Penalty):
    """The same Huber penalty as a penalty, by its value alone."""

    kind: Literal["law_huber"] = "law_huber"

    def describe(self):
        return "a Huber penalty"

    def value(self, moving):
        return sum(
            0.5 * torch.nn.functional.huber_loss(item.parameter, item.anchor, reduction="sum", delta=0.05)
            for item in moving
        )


class HuberByHand(Huber):
    kind: Literal["law_huber_by_hand"] = "law_huber_by_hand"
    sums_over: ClassVar[str] = "elements"

    def gradient(self, moving):
        return [pull_of(item) for item in moving]


class HuberDecoupled(Huber):
    kind: Literal["law_huber_decoupled"] = "law_huber_decoupled"
    mode: Literal["coupled", "decoupled"] = "decoupled"


class AnotherGradient(HuberByHand):
    kind: Literal["law_gradient"] = "law_gradient"

    def gradient(self, moving):
        return [2 * pull_of(item) for item in moving]


class NoSumOverParameters(Huber):
    """A norm of everything, which is no sum of the norms of its parts."""

    kind: Literal["law_parameters"] = "law_parameters"
    sums_over: ClassVar[str] = "parameters"

    def value(self, moving):
        return sum((item.parameter - item.anchor).square().sum() for item in moving).add(1e-6).sqrt()


class NoSumOverRows(NoSumOverParameters):
    kind: Literal["law_rows"] = "law_rows"
    sums_over: ClassVar[str] = "rows"

    def value(self, moving):
        return sum((item.parameter - item.anchor).norm() for item in moving)


class NoSumOverElements(NoSumOverParameters):
    kind: Literal["law_elements"] = "law_elements"
    sums_over: ClassVar[str] = "elements"

    def value(self, moving):
        flat = [(item.parameter - item.anchor) for item in moving]
        return sum((d.reshape(len(d), -1) if d.ndim else d.view(1, 1)).norm(dim=1).sum() for d in flat)


class KernelOfItsOwn(Huber):
    """One that adds twice the gradient."""

    kind: Literal["law_kernel"] = "law_kernel"

    def kernels(self, moving):
        class Twice:
            def add_gradients(self, factor, scale):
                for item in moving:
                    item.parameter.grad = 2 * pull_of(item)

        return [Twice()]


class StepOfItsOwn(HuberDecoupled):
    """A kernel whose gradient is right and whose step goes twice as far."""

    kind: Literal["law_step"] = "law_step"
    skips: ClassVar[bool] = False

    def kernels(self, moving):
        return [TwiceAsFar(moving, self.skips)]


class StepThatIsNotSkipped(StepOfItsOwn):
    """One whose step is right, and is made in steps that are skipped too."""

    kind: Literal["law_not_skipped"] = "law_not_skipped"
    skips: ClassVar[bool] = True


class TwiceAsFar:
    def __init__(self, moving, skips):
        self.moving, self.skips = moving, skips

    def add_gradients(self, factor, scale):
        for item in self.moving:
            item.parameter.grad = factor * pull_of(item)

    def move_weights(self, factor, skip):
        far = 1 if self.skips else 2 * (skip is None)
        for item in self.moving:
            item.parameter.sub_(far * factor * item.group["lr"] * pull_of(item))


@pytest.mark.parametrize("cls", [Rightly, Huber, HuberByHand, HuberDecoupled], ids=lambda cls: cls.__name__)
def test_a_huber_penalty_that_is_right_passes(cls):
    check_strategy(acting(cls))


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (IgnoresTheScale, "law of fused loss scale: .* multiply by step.scale"),
        (ForgetsMissingGradients, "law of missing gradient: AttributeError"),
        (PassesOverMissingGradients, "law of missing gradient: .* a gradient of None than with zeros"),
        (IgnoresTheSign, "law of maximization: .* heed item.group"),
        (ActsOnceAForwardPass, "law of accumulation: .* act once an optimizer step"),
        (SumsOverTheBatch, "law of doubled batch: .* take means over the batch"),
        (AnotherGradient, r"law of penalty gradient: gradient\(\) of AnotherGradient is not the gradient of value"),
        (NoSumOverParameters, "law of penalty gradient: .* of one parameter at a time"),
        (NoSumOverRows, "law of penalty gradient: .* of some rows at a time"),
        (NoSumOverElements, "law of penalty gradient: .* of some elements at a time"),
        (KernelOfItsOwn, "law of penalty gradient: the kernel of"),
        (StepOfItsOwn, "law of penalty gradient: the kernel's step of"),
        (StepThatIsNotSkipped, "law of penalty gradient: the kernel's step of"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_one_that_is_wrong_is_found_by_a_law_with_a_name(cls, message):
    with pytest.raises(AssertionError, match=f"^{cls.__name__} breaks the {message}"):
        check_strategy(acting(cls))


def test_what_is_remembered_elsewhere_is_found():
    """By the copy that trains otherwise; without it, by resuming."""
    NUMBERS.clear()
    with pytest.raises(AssertionError, match="RemembersElsewhere"):
        check_strategy(acting(RemembersElsewhere))


def test_a_pull_that_is_added_twice_is_found(monkeypatch):
    """Once by ``pull()`` and once by the step."""
    act = StepHook._act

    def forgetful(hook):
        hook._added = None
        act(hook)

    monkeypatch.setattr(StepHook, "_act", forgetful)
    with pytest.raises(AssertionError, match=r"L2SP breaks the law of loss scale: .* with adaptation\.pull\(\)"):
        check_strategy(ctl.L2SP())


def test_a_law_is_held_on_a_model_of_ones_own():
    """With inputs that come as a dictionary, and no input at all."""

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)

        def forward(self, x):
            return self.second(self.first(x).tanh())

    for example in ({"x": torch.randn(4, 3)}, None):
        check_strategy(acting(Huber), model=Model(), example=example)
        with pytest.raises(AssertionError, match="law of fused loss scale"):
            check_strategy(acting(IgnoresTheScale), model=Model(), example=example)
