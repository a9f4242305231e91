"""Selective projection decay (SPD): decay toward the source only if going further from it raises the loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from conservtl.bounds import NonNegative
from conservtl.errors import counted
from conservtl.kernels.backend import split
from conservtl.kernels.deviation import TINY, deviations, move_toward, norms, runs, together, totals
from conservtl.kernels.dtensor import local, real_parts
from conservtl.methods._rows import Coverage, source_parameters
from conservtl.methods.base import Aliases, Span, Strategy, TestFields
from conservtl.plan.plan import Plan
from conservtl.plan.update import Moving, Step, Update

__all__ = ["SelectiveDecay", "SelectiveDecayUpdate"]

_DISTANCES, _PRODUCTS = "sizes", "against"  # keys of the update's state, saved with it


class SelectiveDecay(Strategy):
    r"""Decay a tensor toward the source only in steps in which going further from the source raises the loss.

    A step from w to v, with the gradient g of the loss at w before any pull, becomes

    .. math:: v - \min(1, \lambda r)\,(v - w^0) \quad\text{if } \langle g, w - w^0 \rangle > 0, \qquad
        r = \max\left(0, \frac{\lVert v - w^0 \rVert - \lVert w - w^0 \rVert}{\lVert v - w^0 \rVert}\right)

    for each parameter tensor. A positive product means that going further in the same direction raises the loss, so
    that the distance which the step adds comes from momentum or noise. (The paper's condition is the same, with the
    negative gradient and a product below zero.) r is the share of the distance that the step added: lambda = 1 takes
    all of it back, which projects onto the ball that w was on. The strength depends on neither the learning rate nor
    the batch size. Beyond lambda r = 1 the paper overshoots the source; here the source is the limit.

    It replaces the optimizer's weight decay, which is 0 on the parameters covered.

    Measured: docs/methods.md.

    Cost: three passes over the weights a step and two over the source's. No state is kept from step to step.

    Hurts: where gradients are noisy: the condition is decided by one batch.

    Reference:
        Tian, Huang and Kira 2024, "Rethinking weight decay for robust fine-tuning of foundation models", section 3.

    Example:
        >>> import torch, conservtl as ctl
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> adaptation = ctl.adapt(model, {"weight": torch.zeros(1, 1)}, [ctl.SelectiveDecay(strength=1.0)])
        >>> optimizer = adaptation.optimizer(torch.optim.SGD, lr=1.0, momentum=0.9)
        >>> path = []
        >>> for gradient in (-1.0, 0.5):  # the second gradient points back, but momentum goes on to 1.4
        ...     model.weight.grad = torch.tensor([[gradient]])
        ...     optimizer.step()
        ...     path.append(round(model.weight.item(), 3))
        >>> path
        [1.0, 1.0]
    """

    kind: Literal["selective_decay"] = "selective_decay"
    aliases: ClassVar[Aliases] = {"spd": {}}
    test_fields: ClassVar[TestFields] = ({"strength": Span(0, 3)},)
    strength: NonNegative = 2.0
    """lambda. 1 projects; more goes further back."""
    on: Coverage = "weights"
    """weights: parameters of two dimensions or more that no norm owns. all: biases and norms too."""

    def apply(self, plan: Plan) -> Plan:
        """Add the update, and exclude its parameters from weight decay."""
        names = source_parameters(plan, self.on)
        bare = {name: {"weight_decay": False} for name in names}
        plan = plan.choose(self.label, "weight_decay", bare, explicit=False)
        return plan.with_update(SelectiveDecayUpdate(by=self.label, names=names, strength=self.strength))


class SelectiveDecayUpdate(Update):
    """w = v - min(1, strength r) (v - w0) after a step from w to v, if <g, w - w0> > 0."""

    kind: Literal["selective_decay"] = "selective_decay"
    precedence: ClassVar[int] = 30
    shards: ClassVar[bool] = True
    strength: NonNegative
    """lambda."""

    def describe(self) -> str:
        """Return one line for the plan's table."""
        return f"decay of {counted(len(self.names), 'parameter')} by {self.strength:g} if going further raises the loss"

    def gradients(self, step: Step, state: dict[str, Tensor]) -> None:
        """Compute |w - w0| and <g, w - w0> of each tensor, for this step alone."""
        state.clear()
        if not step.moving:
            return
        moves, rest = split(step.moving)
        found = [] if moves is None else [moves.sums("move, gradient", "root")]
        distances, products = zip(*found, *(self._measure(run) for run in runs(rest)), strict=True)
        state[_DISTANCES], state[_PRODUCTS] = _concatenate(distances), _concatenate(products)

    def after(self, step: Step, state: dict[str, Tensor]) -> None:
        """Decay the tensors that moved away against the gradient; in a skipped step none did."""
        if not step.moving:
            return
        before, products = state.pop(_DISTANCES), state.pop(_PRODUCTS)
        moves, rest = split(step.moving)
        first = len(step.moving) - len(rest)
        if moves is not None and moves.whole:
            sign = -1 if step.moving[0].group.get("maximize") else 1
            moves.decay(before[:first], products[:first], self.strength, sign)
        elif moves is not None:
            distances, _ = moves.sums("move, start", "root")
            moves.lerp(self._shares(step.moving[0], distances, before[:first], products[:first]))
        for run in runs(rest):
            part = slice(first, first + len(run))
            self._decay(run, before[part], products[part])
            first += len(run)

    def _measure(self, moving: Sequence[Moving]) -> tuple[Tensor, Tensor]:
        _, _, moved = deviations(moving)
        parameters = [item.parameter for item in moving]
        products = [
            d.new_zeros(())
            if parameter.grad is None
            else torch.dot(real_parts(local(parameter.grad)).reshape(-1), d.reshape(-1))
            for parameter, d in zip(parameters, moved, strict=True)
        ]
        return together(norms(moved, of=parameters)), totals(products, parameters)

    def _decay(self, moving: Sequence[Moving], before: Tensor, products: Tensor) -> None:
        weights, anchors, moved = deviations(moving)
        distances = together(norms(moved, of=[item.parameter for item in moving]))
        amounts = self._shares(moving[0], distances, before, products)
        placed = [amount.to(weight.device) for amount, weight in zip(amounts.unbind(), weights, strict=True)]
        move_toward(weights, anchors, placed)

    def _shares(self, first: Moving, distances: Tensor, before: Tensor, products: Tensor) -> Tensor:
        """Return the share of the way back of each parameter, given |v - w0|, |w - w0| and <g, w - w0>."""
        added = (distances - before.to(distances.device)).clamp(min=0) / distances.clamp(min=TINY)
        products = products.to(distances.device) * (-1.0 if first.group.get("maximize") else 1.0)
        return torch.where(products > 0, (self.strength * added).clamp(max=1), 0.0)  # NaN is not above zero


def _concatenate(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat([part.to(parts[0].device) for part in parts])
