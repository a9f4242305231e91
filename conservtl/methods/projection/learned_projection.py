"""Radii learned on the validation part, once training is over."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call

from conservtl.errors import DataError, SpecError
from conservtl.kernels.deviation import TINY, By, Norm, norms
from conservtl.kernels.dtensor import place_like
from conservtl.layers import canonical
from conservtl.plan.decision import After, FinishContext
from conservtl.runtime.eval_mode import eval_mode
from conservtl.runtime.measuring import Placed

__all__ = ["LearnedProjection"]


class LearnedProjection(After):
    """Projects each tensor to a radius that is learned on the validation loss of the projected model."""

    kind: Literal["learned_projection"] = "learned_projection"
    names: tuple[str, ...]
    """Parameters that are projected."""
    each: By
    """What has a ball of its own; the radius is one a tensor."""
    norm: Norm
    """How the distance is measured."""
    steps: Annotated[int, Field(ge=1)]
    """Steps of Adam."""
    rate: Annotated[float, Field(gt=0)]
    """Its rate, for radii as shares of the distance gone."""

    scored: ClassVar[bool] = True
    shards: ClassVar[bool] = False  # a sharded module takes no other weights for a call

    def describe(self) -> str:
        """One line for the plan's table."""
        return f"{len(self.names)} parameters projected to radii learned on validation, {self.steps} steps"

    def finish(self, ending: FinishContext) -> dict[str, Any]:
        """Learn the radii, and project."""
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
        reach = [size.max() for size in sizes]
        keys = [f"model.{raw[name]}" for name in self.names]

        def projected(shares: Tensor) -> list[Tensor]:
            parts = zip(anchors, moved, sizes, reach, shares.unbind(), strict=True)
            return [w0 + d * (share * far / size.clamp(min=TINY)).clamp(max=1) for w0, d, size, far, share in parts]

        shares = torch.zeros(len(weights), device=weights[0].device, requires_grad=True)
        optimizer = torch.optim.Adam([shares], lr=self.rate)
        model = _Objective(ending.model, ending.objective)
        with torch.enable_grad(), eval_mode(ending.model):
            for batch in _endless(Placed(ending.valid, shares.device), self.steps):
                loss = functional_call(model, dict(zip(keys, projected(shares), strict=True)), (batch,))
                (shares.grad,) = torch.autograd.grad(loss, shares)
                optimizer.step()
                shares.detach().clamp_(0, 1)
        for weight, value in zip(weights, projected(shares.detach()), strict=True):
            weight.copy_(value)
        found = (shares.detach() * torch.stack(reach)).tolist()
        return {"radii": dict(zip(self.names, found, strict=True)), "shares": shares.detach().tolist()}


class _Objective(nn.Module):
    """The loss of a model on a batch, as a module whose parameters can be replaced for a call."""

    def __init__(self, model: nn.Module, loss: Any) -> None:
        super().__init__()
        self.model = model
        self._loss = loss

    def forward(self, batch: Any) -> Tensor:
        found: Tensor = self._loss(self.model, batch)
        return found


def _endless(batches: Iterable[Any], count: int) -> Iterator[Any]:
    """So many batches, gone through again and again."""
    left = count
    while left:
        before = left
        for batch in islice(batches, left):
            left -= 1
            yield batch
        if left == before:
            raise DataError("the validation part has no batches to learn radii on. Give some, or set a radius.")
