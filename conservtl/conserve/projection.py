"""Projection onto a ball around the source, after each step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from conservtl.conserve.toward import TINY, By, Norm, deviations, move_toward, norms, runs
from conservtl.decision import Moving, Step, Update

__all__ = ["Ball"]


class Ball(Update):
    """w = w0 + min(1, r / |d|) d after each step, with d = w - w0."""

    kind: Literal["projection"] = "projection"
    shards: ClassVar[bool] = True
    radius: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    """r, or its ratio to the norm of w0."""
    relative: bool = False
    """Whether the radius is a ratio to the norm of w0."""
    each: By = "tensor"
    """What has a ball of its own."""
    norm: Norm = "frobenius"
    """How the distance is measured."""

    def describe(self) -> str:
        """One line for the plan's table."""
        size = f"{self.radius:g} × |w0|" if self.relative else f"{self.radius:g}"
        return f"{len(self.names)} parameters held within {size} of the source, for each {self.each} ({self.norm} norm)"

    def after(self, step: Step, state: dict[str, Tensor]) -> None:  # noqa: ARG002
        """Project; what is inside its ball keeps every bit."""
        for run in runs(step.moving):
            self._project(run)

    def _project(self, moving: Sequence[Moving]) -> None:
        weights, anchors, moved = deviations(moving)
        of = [item.parameter for item in moving]
        sizes = norms(moved, self.each, self.norm, of=of)
        if self.relative:
            radii = torch._foreach_mul(norms(anchors, self.each, self.norm, of=of), self.radius)  # noqa: SLF001
        else:
            radii = tuple(torch.full_like(size, self.radius) for size in sizes)
        torch._foreach_clamp_min_(sizes, TINY)
        beyond = torch._foreach_sub([torch.ones_like(size) for size in sizes], torch._foreach_div(radii, sizes))  # noqa: SLF001
        torch._foreach_clamp_min_(beyond, 0.0)
        move_toward(weights, anchors, beyond)
