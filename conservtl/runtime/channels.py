"""Channel axis of a layer's features, and means over positions."""

from __future__ import annotations

from torch import Tensor

from conservtl.plan.row import Row

__all__ = ["channel_axis", "channels_first", "pooled"]


def channels_first(rows: tuple[Row, ...]) -> int:
    """Return the number of dimensions of outputs whose channels are second, (N, C, ...); 0: channels are always last.

    A layer with convolutions has outputs of as many dimensions as their weights; outputs with another number come from
    a later module. For one spatial dimension (N, C, frames) and (N, frames, C) have equally many: there the layer's
    last weight decides, so that a Conformer's block, which ends with a linear layer, has its channels last.
    """
    counts = [len(row.shape) for row in rows if row.kind == "weight"]
    most = max(counts, default=0)
    return most if most > 3 or (counts and counts[-1] == most == 3) else 0


def channel_axis(features: Tensor, first: int) -> int:
    """Return the channel axis; ``first`` is the layer's ``channels_first``."""
    return 1 if features.ndim == first else features.ndim - 1


def pooled(features: Tensor, axis: int) -> Tensor:
    """Return the means over all positions.

    Args:
        features: (N, ...), of at least two dimensions.
        axis: axis of the channels.

    Returns:
        (N, channels).
    """
    return features.movedim(axis, 1).flatten(2).mean(2) if features.ndim > 2 else features
