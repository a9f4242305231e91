"""Sums of squared differences that keep for the backward pass the features themselves, and no copy of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["EPSILON", "squared_distance", "unit_distance"]

EPSILON = 1e-10  # added to the squared norm of a feature vector, as in LPIPS


def squared_distance(features: Tensor, source: Tensor) -> Tensor:
    """Return the sum of (features - source)², a scalar in single precision or more.

    Differences are in that precision too, but are computed again in the backward pass instead of kept.

    Args:
        features: of any shape.
        source: alike; no gradient reaches it.
    """
    total: Tensor = _SquaredDistance.apply(features, source.detach())  # type: ignore[no-untyped-call]
    return total


def unit_distance(features: Tensor, source: Tensor, axis: int) -> Tensor:
    """Return the sum of squared differences of feature vectors scaled to length 1; arguments as above."""
    total: Tensor = _UnitDistance.apply(features, source.detach(), axis)  # type: ignore[no-untyped-call]
    return total


class _SquaredDistance(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, source: Tensor) -> Tensor:
        ctx.save_for_backward(features, source)
        return _difference(features, source).square_().sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Any:
        features, source = ctx.saved_tensors
        return _difference(features, source).mul_(2 * upstream).to(features.dtype), None


class _UnitDistance(torch.autograd.Function):
    """With a = 1 / |z| and u = a z - b t: |u|², whose gradient is 2 a (u - a z <a z, u>)."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, source: Tensor, axis: int) -> Tensor:
        ours, theirs = _inverse_length(features, axis), _inverse_length(source, axis)
        ctx.save_for_backward(features, source, ours, theirs)
        ctx.axis = axis
        return _unit_difference(features, source, ours, theirs).square_().sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Any:
        features, source, ours, theirs = ctx.saved_tensors
        difference = _unit_difference(features, source, ours, theirs)
        along = (difference * features).sum(ctx.axis, keepdim=True) * ours.square()
        gradient = difference.sub_(features * along).mul_(2 * upstream * ours)
        return gradient.to(features.dtype), None, None


def _difference(features: Tensor, source: Tensor) -> Tensor:
    wide = torch.promote_types(features.dtype, torch.float32)
    return features.to(wide, copy=True).sub_(source)


def _unit_difference(features: Tensor, source: Tensor, ours: Tensor, theirs: Tensor) -> Tensor:
    return (features * ours).sub_(source * theirs)


def _inverse_length(features: Tensor, axis: int) -> Tensor:
    """Return 1 / |z|, in single precision or more; under the root a number is added, so that z = 0 has a gradient."""
    wide = torch.promote_types(features.dtype, torch.float32)
    squares: Tensor = torch.linalg.vector_norm(features, dim=axis, keepdim=True, dtype=wide).square_()
    return squares.add_(EPSILON).rsqrt_()
