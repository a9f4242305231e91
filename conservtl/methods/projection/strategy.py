"""Projection: weights may go only so far from the source."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from conservtl.kernels.deviation import TINY, By, Norm, deviations, move_toward, norms, runs
from conservtl.methods.base import Strategy
from conservtl.methods.projection.learned_projection import LearnedProjection
from conservtl.plan.decision import Moving, Step, Update
from conservtl.plan.plan import Plan

__all__ = ["Projection", "ProjectionUpdate"]


class ProjectionUpdate(Update):
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


Radius = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Projection(Strategy):
    r"""Hold weights inside a ball around the source, or find how large it may be once training is over.

    .. math:: w = w^0 + \min\left(1, \frac{r}{\lVert d \rVert}\right) d, \qquad d = w - w^0

    for each parameter tensor, or for each row of it (an output channel). ``frobenius`` is the root of the sum of
    squares; ``mars`` the maximum absolute row sum, for one row its sum of absolute values.

    With a number as the radius, after every step. What is inside its ball keeps every bit; a radius of 0 is the source.
    ``relative`` takes it times the norm of w0, so that one number serves tensors of all sizes; what is zero at the
    source then stays zero.

    With ``radius="learn"`` training is plain, and one radius a tensor is found afterwards on the validation part: by
    ``steps`` steps of Adam on the loss of the projected model in eval mode, starting from the source itself. So each
    tensor leaves the source as far only as the target's validation loss asks for. A radius is learned as its share of
    the distance gone, which does not depend on the tensor's size.

    It does not depend on the batch size or the rate.

    Measured with its defaults against plain fine-tuning at 1e-4, in points of the harmonic mean of both domains, for a
    new speaker with one and five recordings a word and for corrupted images: +0.2 ± 0.2, -0.1 ± 0.2 and +0.1 ± 1.4
    (benchmarks/results/methods.md).

    Cost: two passes over the weights a step and one over the source's; learned, nothing while training, and
    not for sharded parameters.

    Reference:
        Gouk, Hospedales and Pontil 2021, "Distance-based regularisation of deep networks for fine-tuning", section 4.
        Learned: Tian et al. 2023, "Trainable projected gradient method for robust fine-tuning", section 3, once at the
        end instead of along the way.
    """

    kind: Literal["projection"] = "projection"
    radius: Radius | Literal["learn"] = 0.03
    """r, a ratio with ``relative``; or ``learn``: on the validation part, after training."""
    relative: bool = True
    """Whether the radius is a ratio to the norm of w0."""
    by: By = "tensor"
    """What has a ball of its own: a tensor, or each of its rows (the first dimension)."""
    norm: Norm = "frobenius"
    """How the distance is measured."""
    on: Literal["weights", "all"] = "weights"
    """weights: two dimensions or more and not owned by a norm. all: biases and norms too."""
    steps: Annotated[int, Field(ge=1)] | None = None
    """Steps of learning. None: 100. For ``learn``."""
    rate: Annotated[float, Field(gt=0, le=1)] | None = None
    """Adam's rate for a share in [0, 1]. None: 0.02. For ``learn``."""

    @model_validator(mode="after")
    def _only_for_learn(self) -> Self:
        given = [name for name in ("steps", "rate") if getattr(self, name) is not None]
        if given and self.radius != "learn":
            raise ValueError(f"{given[0]} is for radius='learn'; received radius={self.radius!r}: leave one out")
        return self

    def apply(self, plan: Plan) -> Plan:
        """Add the update, or the ending."""
        names = tuple(
            row.name
            for row in plan.rows
            if row.origin == "source" and not row.frozen and (self.on == "all" or row.kind == "weight")
        )
        if self.radius == "learn":
            return plan.with_after(
                LearnedProjection(
                    by=self.label,
                    names=names,
                    each=self.by,
                    norm=self.norm,
                    steps=self.steps or 100,
                    rate=self.rate or 0.02,
                )
            )
        return plan.with_update(
            ProjectionUpdate(
                by=self.label,
                names=names,
                radius=self.radius,
                relative=self.relative,
                each=self.by,
                norm=self.norm,
            )
        )
