"""Distances of features to the source's, as a term of the loss; without copies kept for the backward pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from conservtl.bounds import NonNegative
from conservtl.errors import SpecError, counted
from conservtl.kernels.deviation import together
from conservtl.padding.masked import comparable, masked_mean
from conservtl.plan.term import Term, View, all_of

__all__ = ["EPSILON", "FeatureConservationTerm", "delta", "ldifs", "squared_distance", "unit_distance"]


class FeatureConservationTerm(Term):
    """Distance of tapped features to the source's."""

    kind: Literal["features"] = "features"
    alpha: NonNegative
    """Factor on the distance."""
    metric: Literal["delta", "ldifs"] = "delta"
    """delta: distance of feature maps as they are. ldifs: distance of feature vectors scaled to length 1."""
    padding: Literal["leave_out", "count"] = "leave_out"
    """count: padding is compared too."""

    def describe(self) -> str:
        """Return one line for the plan's table."""
        name = "feature maps" if self.metric == "delta" else "normalised features"
        weighted = ", channels weighted by attention" if self.reads else ""
        return f"{self.alpha:g} × distance of {name} to the source's at {', '.join(self.taps)}{weighted}"

    def value(self, adapted: View, source: View | None, measured: Mapping[str, Mapping[str, Tensor]]) -> Tensor:
        """Return the term: the sum over the layers that ran in this pass, 0 if none did."""
        parts = []
        for layer in self.taps:
            features, axes = all_of(adapted.features, layer), all_of(adapted.axes, layer)
            targets = all_of(source.features, layer) if source is not None else []
            if not features or not targets:
                continue
            if len(features) != len(targets):
                raise SpecError(
                    f"{self.by}: layer {layer!r} gives {counted(len(features), 'output')} in a forward pass of the "
                    f"model, {len(targets)} in one of the source (its calls and parts together). Tap a layer that "
                    "gives as many in both."
                )
            weights = measured[self.reads[0]][layer] if self.reads else None
            calls = [self._distance(layer, adapted, *one, weights) for one in zip(features, targets, axes, strict=True)]
            parts.append(torch.stack(calls).mean())
        if not parts:
            return torch.zeros(())
        return self.alpha * together(parts).sum()

    def _distance(
        self, layer: str, adapted: View, features: Tensor, target: Tensor, axis: int, weights: Tensor | None
    ) -> Tensor:
        """Return the distance of one output of a layer."""
        if features.shape[1:] == target.shape[1:] and len(features) != len(target):
            raise SpecError(
                f"{self.by}: the model's features are of {counted(len(features), 'example')}, the source's of "
                f"{len(target)}. Give "
                f"loss(..., inputs) the inputs that the outputs came from; if {layer!r} is an expert, which sees some "
                "examples only, tap the layer that contains it."
            )
        if features.shape != target.shape:
            raise SpecError(
                f"{self.by}: layer {layer!r} gives features of shape {tuple(features.shape)}, in the source "
                f"{tuple(target.shape)}. Tap layers that are the same in both."
            )
        mask = adapted.valid(layer, features, axis) if self.padding == "leave_out" else None
        if self.metric == "ldifs":
            return ldifs(features, target, axis, mask)
        if weights is not None and weights.shape != (features.shape[axis],):
            raise SpecError(
                f"{self.by}: layer {layer!r} has {features.shape[axis]} channels, but {self.reads[0]!r} weighs "
                f"{tuple(weights.shape)} of them. Measure it on this model."
            )
        return delta(features, target, axis, weights, mask)


def delta(
    features: Tensor, source: Tensor, axis: int, weights: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """Return half the sum over channels of W_c |FM_c - FM0_c|² / positions, the mean over examples.

    Args:
        features: features of the adapted model, with two or more dimensions.
        source: features of the source model, the same shape; no gradient reaches them.
        axis: axis of the channels; all others are examples and positions.
        weights: W, (channels,). None: 1.
        mask: shape of the features without the channel axis, false for padding. None: no padding.
    """
    if weights is None and mask is None:
        return squared_distance(features, source) / (2 * _positions(features, axis))
    adapted, target = comparable(features, source, mask, axis)
    squares = (adapted - target).square().movedim(axis, -1)
    if weights is not None:
        squares = squares * weights.to(squares)
    return masked_mean(squares.sum(-1), mask) / 2


def ldifs(features: Tensor, source: Tensor, axis: int, mask: Tensor | None = None) -> Tensor:
    """Return the squared distance of feature vectors scaled to length 1, the mean over positions and examples.

    Arguments as for ``delta``.
    """
    if mask is None:
        return unit_distance(features, source, axis) / _positions(features, axis)
    adapted, target = comparable(features, source, mask, axis)
    return masked_mean((_unit(adapted, axis) - _unit(target, axis)).square().sum(axis), mask)


def _positions(features: Tensor, axis: int) -> int:
    """Return the number of feature vectors."""
    return features.numel() // max(1, features.shape[axis])


def _unit(features: Tensor, axis: int) -> Tensor:
    # Added under the root, so that features that are all 0 have a finite gradient.
    return features / (features.square().sum(axis, keepdim=True) + EPSILON).sqrt()


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
