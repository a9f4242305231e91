"""Projection to radii that are learned on the validation part after training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.func import functional_call

from conservtl.bounds import Count, Positive
from conservtl.errors import DataError, SpecError, counted
from conservtl.kernels.deviation import TINY, By, Norm, norms
from conservtl.kernels.dtensor import place_like
from conservtl.layers import canonical
from conservtl.plan.after import After, FinishContext
from conservtl.runtime.measuring import Placed
from conservtl.runtime.per_example import ModelValue
from conservtl.runtime.preserve import eval_mode

__all__ = ["LearnedProjection"]


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
