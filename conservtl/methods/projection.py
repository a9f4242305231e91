"""Projection: weights are held within a distance of the source."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import model_validator
from torch import Tensor
from torch.func import functional_call

from conservtl.bounds import Count, Fraction, NonNegative, Positive
from conservtl.compat import foreach_clamp_min_, foreach_div, foreach_mul, foreach_sub
from conservtl.errors import DataError, SpecError, counted
from conservtl.kernels.backend import split
from conservtl.kernels.deviation import TINY, By, Norm, deviations, move_toward, norms, runs
from conservtl.kernels.dtensor import place_like
from conservtl.layers import canonical
from conservtl.methods._rows import Coverage, source_parameters
from conservtl.methods.base import Span, Strategy, TestFields
from conservtl.plan.decision import After, FinishContext
from conservtl.plan.plan import Plan
from conservtl.plan.update import Moving, Step, Update
from conservtl.runtime.measuring import Placed
from conservtl.runtime.per_example import ModelValue
from conservtl.runtime.preserve import eval_mode

__all__ = ["LearnedProjection", "Projection", "ProjectionUpdate"]


class Projection(Strategy):
    r"""Hold weights inside a ball around the source, of a set radius or of one learned after training.

    .. math:: w = w^0 + \min\left(1, \frac{r}{\lVert d \rVert}\right) d, \qquad d = w - w^0

    for each parameter tensor, or for each of its rows (output channels). ``frobenius`` is the root of the sum of
    squares; ``mars`` is the maximum absolute row sum, which for a single row is the sum of its absolute values.

    A number as the radius is enforced after every step. A tensor inside its ball keeps every bit; with a radius of 0
    it stays at the source. ``relative`` multiplies the radius by the norm of w0, so that one number serves tensors of
    all sizes; a tensor that is zero in the source then stays zero.

    With ``radius="learn"`` training is plain. Afterwards one radius for each tensor is learned on the validation part,
    by ``steps`` steps of Adam on the loss of the projected model in eval mode, beginning at the source itself. Each
    tensor so leaves the source only as far as the validation loss asks for. A radius is learned as its share of the
    distance covered in training, which does not depend on the size of the tensor.

    The radius depends on neither the batch size nor the learning rate.

    Measured: docs/methods.md.

    Cost: two passes over the weights a step and one over the source's; with a learned radius none while training, and
    sharded parameters are refused.

    Hurts: where one radius must serve layers that need to move and layers that need not.

    Reference:
        Gouk, Hospedales and Pontil 2021, "Distance-based regularisation of deep networks for fine-tuning", section 4.
        Learned: Tian et al. 2023, "Trainable projected gradient method for robust fine-tuning", section 3, here once
        at the end instead of during training.

    Example:
        >>> import torch, conservtl as ctl
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> source = {"weight": torch.tensor([[3.0, 4.0]])}  # of norm 5
        >>> adaptation = ctl.adapt(model, source, [ctl.Projection(radius=0.1)])
        >>> optimizer = adaptation.optimizer(torch.optim.SGD, lr=1.0)
        >>> model.weight.grad = torch.tensor([[9.0, 0.0]])
        >>> optimizer.step()  # 9 away from the source, and back to a distance of 0.1 × 5
        >>> [round(weight, 3) for weight in model.weight.flatten().tolist()]
        [2.5, 4.0]
    """

    kind: Literal["projection"] = "projection"
    test_fields: ClassVar[TestFields] = ({"radius": Span(0.1, 1), "steps": None, "rate": None},)
    radius: NonNegative | Literal["learn"] = 0.03
    """r, as a ratio if ``relative``. learn: learned on the validation part after training."""
    relative: bool = True
    """Whether the radius is a ratio to the norm of w0."""
    by: By = "tensor"
    """Unit that has a ball: each tensor, or each of its rows (the first dimension)."""
    norm: Norm = "frobenius"
    """Norm of the distance."""
    on: Coverage = "weights"
    """weights: parameters of two dimensions or more that no norm owns. all: biases and norms too."""
    steps: Count | None = None
    """Steps of learning, for ``learn``. None: 100."""
    rate: Fraction | None = None
    """Adam's learning rate for a share in [0, 1], for ``learn``. None: 0.02."""

    @model_validator(mode="after")
    def _only_for_learn(self) -> Self:
        given = [name for name in ("steps", "rate") if getattr(self, name) is not None]
        if given and self.radius != "learn":
            raise ValueError(f"{given[0]} is for radius='learn'; received radius={self.radius!r}: leave one out")
        return self

    def apply(self, plan: Plan) -> Plan:
        """Add the update, or the projection after training."""
        names = source_parameters(plan, self.on)
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


class ProjectionUpdate(Update):
    """w = w0 + min(1, r / |d|) d after each step, with d = w - w0."""

    kind: Literal["projection"] = "projection"
    precedence: ClassVar[int] = 20
    shards: ClassVar[bool] = True
    radius: NonNegative
    """r, or its ratio to the norm of w0."""
    relative: bool = False
    """Whether the radius is a ratio to the norm of w0."""
    each: By = "tensor"
    """Unit that has a ball."""
    norm: Norm = "frobenius"
    """Norm of the distance."""

    def describe(self) -> str:
        """Return one line for the plan's table."""
        size = f"{self.radius:g} × |w0|" if self.relative else f"{self.radius:g}"
        return (
            f"{counted(len(self.names), 'parameter')} held within {size} of the source, for each {self.each} "
            f"({self.norm} norm)"
        )

    def after(self, step: Step, state: dict[str, Tensor]) -> None:  # noqa: ARG002
        """Project the weights; those inside their ball keep every bit."""
        rows = self.each == "row"
        mars = self.norm == "mars"
        moves, rest = split(step.moving, rows=rows or mars, new=False, short=mars and not rows)
        if moves is not None and rows:
            moves.rows_into_balls(self.radius, absolute=mars, relative=self.relative)
        elif moves is not None:
            sizes, starts = moves.largest_rows() if mars else moves.sums("move, start", "roots")
            radii = starts * self.radius if self.relative else torch.full_like(sizes, self.radius)
            moves.lerp((1 - radii / sizes.clamp(min=TINY)).clamp(min=0))
        for run in runs(rest):
            self._project(run)

    def _project(self, moving: Sequence[Moving]) -> None:
        weights, anchors, moved = deviations(moving)
        parameters = [item.parameter for item in moving]
        sizes = norms(moved, self.each, self.norm, of=parameters)
        if self.relative:
            starts = [
                anchor if item.new is None else anchor.masked_fill(item.new, 0)
                for item, anchor in zip(moving, anchors, strict=True)
            ]
            radii = foreach_mul(norms(starts, self.each, self.norm, of=parameters), self.radius)
        else:
            radii = tuple(torch.full_like(size, self.radius) for size in sizes)
        foreach_clamp_min_(sizes, TINY)
        ones = [torch.ones_like(size) for size in sizes]
        shares_back = foreach_sub(ones, foreach_div(radii, sizes))
        foreach_clamp_min_(shares_back, 0.0)
        move_toward(weights, anchors, shares_back)


class LearnedProjection(After):
    """Project each tensor to a radius that is learned on the validation loss of the projected model."""

    kind: Literal["learned_projection"] = "learned_projection"
    names: tuple[str, ...]
    """Parameters to project."""
    each: By
    """Unit that has a ball; the radius is one for each tensor."""
    norm: Norm
    """Norm of the distance."""
    steps: Count
    """Steps of Adam."""
    rate: Positive
    """Adam's learning rate, for radii as shares of the distance covered in training."""

    scored: ClassVar[bool] = True
    shards: ClassVar[bool] = False  # functional_call cannot replace the weights of a sharded module

    def describe(self) -> str:
        """Return one line for the plan's table."""
        return (
            f"{counted(len(self.names), 'parameter')} projected to radii learned on validation, "
            f"{counted(self.steps, 'step')}"
        )

    def finish(self, ending: FinishContext) -> dict[str, Any]:
        """Learn the radii, and project the weights."""
        if ending.valid is None or ending.objective is None:
            raise SpecError(
                f"{self.by} learns on a validation part: pass finish(..., valid=batches), or give fit valid={{...}}."
            )
        raw = {canonical(name): name for name, _ in ending.model.named_parameters()}
        weights = [ending.model.get_parameter(raw[name]).detach() for name in self.names]
        if not weights:
            return {"radii": {}}
        anchors = [place_like(ending.start[name], weight) for name, weight in zip(self.names, weights, strict=True)]
        moved = [weight - anchor for weight, anchor in zip(weights, anchors, strict=True)]
        sizes = norms(moved, self.each, self.norm)
        furthest = [size.max() for size in sizes]
        keys = [f"model.{raw[name]}" for name in self.names]

        def projected(shares: Tensor) -> list[Tensor]:
            parts = zip(anchors, moved, sizes, furthest, shares.unbind(), strict=True)
            return [w0 + d * (share * far / size.clamp(min=TINY)).clamp(max=1) for w0, d, size, far, share in parts]

        shares = torch.zeros(len(weights), device=weights[0].device, requires_grad=True)
        optimizer = torch.optim.Adam([shares], lr=self.rate)
        model = ModelValue(ending.model, ending.objective)
        with torch.enable_grad(), eval_mode(ending.model):
            for batch in _endless(Placed(ending.valid, shares.device), self.steps):
                loss = functional_call(model, dict(zip(keys, projected(shares), strict=True)), (batch,))
                (shares.grad,) = torch.autograd.grad(loss, shares)
                optimizer.step()
                shares.detach().clamp_(0, 1)
        for weight, value in zip(weights, projected(shares.detach()), strict=True):
            weight.copy_(value)
        radii = (shares.detach() * torch.stack(furthest)).tolist()
        return {"radii": dict(zip(self.names, radii, strict=True)), "shares": shares.detach().tolist()}


def _endless(batches: Iterable[Any], count: int) -> Iterator[Any]:
    """Yield this many batches, iterating as often as necessary."""
    left = count
    while left:
        before = left
        for batch in islice(batches, left):
            left -= 1
            yield batch
        if left == before:
            raise DataError("the validation part has no batches to learn radii on. Give some, or set a radius.")
