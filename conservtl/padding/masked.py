"""Comparisons and means over the positions that count."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["comparable", "masked_mean"]


def comparable(adapted: Tensor, source: Tensor, mask: Tensor | None, axis: int | None) -> tuple[Tensor, Tensor]:
    """Return both in single precision or more, 0 where the mask is false: padding may be anything, NaN included.

    Args:
        adapted: of the adapted model.
        source: of the source model, the same shape; no gradient reaches it.
        mask: their shape without the axis; None: all positions count.
        axis: of classes or channels; None: every element is a position.
    """
    both = [one.to(torch.promote_types(one.dtype, torch.float32)) for one in (adapted, source.detach())]
    if mask is None:
        return both[0], both[1]
    wide = mask if axis is None else mask.unsqueeze(axis)
    return torch.where(wide, both[0], 0.0), torch.where(wide, both[1], 0.0)


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean of values over the mask; 0 if nothing counts."""
    if mask is None:
        return values.mean()
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)
