"""Selective projection decay (SPD): back toward the source only where going on no longer pays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from conservtl.kernels.deviation import TINY, deviations, move_toward, norms, runs, together, totals
from conservtl.kernels.dtensor import local
from conservtl.methods.base import Aliases, Span, Strategy, TestFields
from conservtl.plan.decision import Moving, Step, Update
from conservtl.plan.plan import Plan

__all__ = ["SelectiveDecay", "SelectiveDecayUpdate"]


_SIZES, _AGAINST = "sizes", "against"


class SelectiveDecayUpdate(Update):
    """w = v - min(1, strength r) (v - w0) after a step from w to v, where <g, w - w0> > 0."""

    kind: Literal["selective_decay"] = "selective_decay"
    shards: ClassVar[bool] = True
    strength: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    """lambda."""

    def describe(self) -> str:
        """One line for the plan's table."""
        return f"{len(self.names)} parameters decay to the source by {self.strength:g} where the loss rises with them"

    def gradients(self, step: Step, state: dict[str, Tensor]) -> None:
        """Note |w - w0| and <g, w - w0> of each tensor, for this step alone."""
        state.clear()
        if not step.moving:
            return
        sizes, products = zip(*(self._noted(run) for run in runs(step.moving)), strict=True)
        state[_SIZES], state[_AGAINST] = _joined(sizes), _joined(products)

    def after(self, step: Step, state: dict[str, Tensor]) -> None:
        """Decay what moved away against the gradient; in a step that was skipped nothing moved away."""
        if not step.moving:
            return
        before, against = state.pop(_SIZES), state.pop(_AGAINST)
        at = 0
        for run in runs(step.moving):
            self._decay(run, before[at : at + len(run)], against[at : at + len(run)])
            at += len(run)

    def _noted(self, moving: Sequence[Moving]) -> tuple[Tensor, Tensor]:
        _, _, moved = deviations(moving)
        of = [item.parameter for item in moving]
        products = [
            d.new_zeros(()) if parameter.grad is None else torch.dot(local(parameter.grad).reshape(-1), d.reshape(-1))
            for parameter, d in zip(of, moved, strict=True)
        ]
        return together(norms(moved, of=of)), totals(products, of)

    def _decay(self, moving: Sequence[Moving], before: Tensor, against: Tensor) -> None:
        weights, anchors, moved = deviations(moving)
        sizes = together(norms(moved, of=[item.parameter for item in moving]))
        share = (sizes - before.to(sizes.device)).clamp(min=0) / sizes.clamp(min=TINY)
        against = against.to(sizes.device) * (-1.0 if moving[0].group.get("maximize") else 1.0)
        amounts = torch.where(against > 0, (self.strength * share).clamp(max=1), 0.0)  # NaN is not above zero
        placed = [amount.to(weight.device) for amount, weight in zip(amounts.unbind(), weights, strict=True)]
        move_toward(weights, anchors, placed)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.to(parts[0].device) for part in parts])


class SelectiveDecay(Strategy):
    r"""Decay a tensor toward the source only in steps in which going further from the source raises the loss.

    A step from w to v, with the loss's gradient g at w before any pull, becomes

    .. math:: v - \min(1, \lambda r)\,(v - w^0) \quad\text{if } \langle g, w - w^0 \rangle > 0, \qquad
        r = \max\left(0, \frac{\lVert v - w^0 \rVert - \lVert w - w^0 \rVert}{\lVert v - w^0 \rVert}\right)

    for each parameter tensor. A positive product says that going on the same way raises the loss (the paper's
    condition is that of the negative gradient with w - w0, below zero): what the step then adds to the distance is
    momentum or noise. r is the share of the distance that the step added, so lambda = 1 takes all of it back: a
    projection onto the ball that w was on. The strength needs no rate, and does not depend on the batch size. Beyond
    lambda r = 1 the paper overshoots the source; here the source is the end.

    It stands for the optimizer's weight decay, which is 0 on what it covers.

    Measured with its defaults against plain fine-tuning at 1e-4, in points of the harmonic mean of both domains, for a
    new speaker with one and five recordings a word and for corrupted images: -0.0 ± 0.4, +0.2 ± 0.3 and +0.2 ± 0.7
    (benchmarks/results/methods.md).

    Cost: three passes over the weights a step and two over the source's. Nothing is remembered from step to step.

    Reference:
        Tian, Huang and Kira 2024, "Rethinking weight decay for robust fine-tuning of foundation models", section 3.
    """

    kind: Literal["selective_decay"] = "selective_decay"
    aliases: ClassVar[Aliases] = {"spd": {}}
    test_fields: ClassVar[TestFields] = ({"strength": Span(0, 3)},)
    strength: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 2.0
    """lambda; 1 is the projection, more goes further back."""
    on: Literal["weights", "all"] = "weights"
    """weights: two dimensions or more and not owned by a norm. all: biases and norms too."""

    def apply(self, plan: Plan) -> Plan:
        """Add the update, and keep weight decay off."""
        names = tuple(
            row.name
            for row in plan.rows
            if row.origin == "source" and not row.frozen and (self.on == "all" or row.kind == "weight")
        )
        bare = {name: {"weight_decay": False} for name in names}
        plan = plan.choose(self.label, "weight_decay", bare, explicit=False)
        return plan.with_update(SelectiveDecayUpdate(by=self.label, names=names, strength=self.strength))
