"""Conserving features: what layers inside the model compute, held to what the source's compute."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from conservtl.errors import SpecError
from conservtl.plan.decision import Term, View
from conservtl.runtime.channels import channel_axis

__all__ = ["FeatureConservationTerm", "delta", "ldifs"]


_EPSILON = 1e-10  # beside the norm of a feature vector, as in LPIPS


class FeatureConservationTerm(Term):
    """Distance of tapped features to the source's."""

    kind: Literal["features"] = "features"
    alpha: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    """Factor on it."""
    metric: Literal["delta", "ldifs"] = "delta"
    """delta: of feature maps as they are. ldifs: of feature vectors of length 1."""
    first: dict[str, int] = Field(default_factory=dict)
    """Layer -> number of dimensions with which its output has the channels second, not last; see ``channels_first``."""

    def describe(self) -> str:
        """One line for the plan's table."""
        name = "feature maps" if self.metric == "delta" else "normalised features"
        weighed = ", channels weighed by attention" if self.reads else ""
        return f"{self.alpha:g} × distance of {name} to the source's at {', '.join(self.taps)}{weighed}"

    def value(self, adapted: View, source: View | None, measured: Mapping[str, Mapping[str, Tensor]]) -> Tensor:
        """The term."""
        theirs = source.features if source is not None else {}
        parts = []
        for layer in self.taps:
            ours, other = adapted.features[layer], theirs[layer]
            if ours.shape[1:] == other.shape[1:] and len(ours) != len(other):
                raise SpecError(
                    f"{self.by}: the model's features are of {len(ours)} examples, the source's of {len(other)}. Give "
                    "loss(..., inputs) the inputs that the outputs came from."
                )
            if ours.shape != other.shape:
                raise SpecError(
                    f"{self.by}: layer {layer!r} gives features of shape {tuple(ours.shape)}, in the source "
                    f"{tuple(other.shape)}. Tap layers that are the same in both."
                )
            axis = channel_axis(ours, self.first.get(layer, 0))
            if self.metric == "ldifs":
                parts.append(ldifs(ours, other, axis))
                continue
            weights = measured[self.reads[0]][layer] if self.reads else None
            if weights is not None and weights.shape != (ours.shape[axis],):
                raise SpecError(
                    f"{self.by}: layer {layer!r} has {ours.shape[axis]} channels, but {self.reads[0]!r} weighs "
                    f"{tuple(weights.shape)} of them. Measure it on this model."
                )
            parts.append(delta(ours, other, axis, weights))
        return self.alpha * torch.stack([part.to(parts[0].device) for part in parts]).sum()


def delta(features: Tensor, source: Tensor, axis: int, weights: Tensor | None = None) -> Tensor:
    """Half the sum over channels of W_c |FM_c - FM0_c|² / positions, the mean over examples.

    Args:
        features: of the adapted model, at least two dimensions.
        source: of the source model, the same shape; no gradient reaches it.
        axis: of the channels; all others are examples and positions.
        weights: (channels,) W; None: 1.
    """
    squares = (_wide(features) - _wide(source.detach())).square().movedim(axis, -1)
    if weights is not None:
        squares = squares * weights.to(squares)
    return squares.sum(-1).mean() / 2


def ldifs(features: Tensor, source: Tensor, axis: int) -> Tensor:
    """Squared distance of feature vectors, each divided by its norm over channels; mean over positions and examples.

    Arguments as of ``delta``.
    """
    ours, theirs = _wide(features), _wide(source.detach())
    return (_unit(ours, axis) - _unit(theirs, axis)).square().sum(axis).mean()


def _unit(features: Tensor, axis: int) -> Tensor:
    # Under the root, so that features that are all 0 have a finite gradient.
    return features / (features.square().sum(axis, keepdim=True) + _EPSILON).sqrt()


def _wide(features: Tensor) -> Tensor:
    return features.float() if features.dtype in (torch.float16, torch.bfloat16) else features
