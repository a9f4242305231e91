"""The channel axis of a layer's features, and their means over positions."""

from __future__ import annotations

from torch import Tensor

from conservtl.plan.row import Row

__all__ = ["channel_axis", "channels_first", "pooled"]


def channels_first(rows: tuple[Row, ...]) -> int:
    """Number of dimensions with which a layer's output has its channels second, (N, C, ...); 0: always last.

    Those of its convolutions: with as many dimensions as their weights outputs are theirs, with other numbers of
    something behind them. In one dimension (N, C, frames) and (N, frames, C) look alike: there the layer's last weight
    decides, so that a Conformer's block, which ends with a linear layer, has them last.
    """
    counts = [len(row.shape) for row in rows if row.kind == "weight"]
    most = max(counts, default=0)
    return most if most > 3 or (counts and counts[-1] == most == 3) else 0


def channel_axis(features: Tensor, first: int) -> int:
    """Axis of the channels, given what ``channels_first`` says of the layer."""
    return 1 if features.ndim == first else features.ndim - 1


def pooled(features: Tensor, axis: int) -> Tensor:
    """Means (N, channels) over all positions of (N, ...).

    Args:
        features: at least two dimensions.
        axis: of the channels.
    """
    return features.movedim(axis, 1).flatten(2).mean(2) if features.ndim > 2 else features
