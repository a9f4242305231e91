"""Selective projection decay: back toward the source where the last steps' direction no longer lowers the loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from conservtl.conserve.shards import local
from conservtl.conserve.toward import TINY, deviations, move_toward, norms, runs, together, totals
from conservtl.decision import Moving, Step, Update

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
