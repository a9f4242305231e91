"""Selective projection decay: back toward the source where the last steps' direction no longer lowers the loss."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from conservtl.conserve.shards import local
from conservtl.conserve.toward import TINY, deviations, move_toward, norms, together, totals
from conservtl.decision import Step, Update

__all__ = ["Selective"]

_SIZES, _AGAINST = "sizes", "against"


class Selective(Update):
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
        _, _, moved = deviations(step.moving)
        if not moved:
            return
        of = [item.parameter for item in step.moving]
        state[_SIZES] = together(norms(moved, of=of))
        products = [
            d.new_zeros(()) if parameter.grad is None else (local(parameter.grad) * d).sum()
            for parameter, d in zip(of, moved, strict=True)
        ]
        state[_AGAINST] = totals(products, of)

    def after(self, step: Step, state: dict[str, Tensor]) -> None:
        """Decay what moved away against the gradient; in a step that was skipped nothing moved away."""
        weights, anchors, moved = deviations(step.moving)
        if not weights:
            return
        sizes = together(norms(moved, of=[item.parameter for item in step.moving]))
        share = (sizes - state.pop(_SIZES)).clamp(min=0) / sizes.clamp(min=TINY)
        against = state.pop(_AGAINST) * (-1.0 if step.moving[0].group.get("maximize") else 1.0)
        amounts = torch.where(against > 0, (self.strength * share).clamp(max=1), 0.0)  # NaN is not above zero
        placed = [amount.to(weight.device) for amount, weight in zip(amounts.unbind(), weights, strict=True)]
        move_toward(weights, anchors, placed)
