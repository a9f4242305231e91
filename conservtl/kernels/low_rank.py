"""Changes of weights by a product of low rank, scale × B A."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["dense_change", "squared_change"]


def squared_change(a: Tensor, b: Tensor, scale: float) -> Tensor:
    r"""Return the squared Frobenius norm of scale × B A, from two r × r products.

    .. math:: s^2 \lVert B A \rVert_F^2 = s^2 \sum (B^\top B) \circ (A A^\top)

    Args:
        a: (r, ...), what follows is one axis.
        b: (outputs, r), or (outputs, r, 1, ...) of a convolution.
        scale: s.
    """
    a, b = a.flatten(1), b.flatten(1)
    with torch.autocast(a.device.type, enabled=False):
        return scale**2 * ((b.mT @ b) * (a @ a.mT)).sum()


@torch.no_grad()
def dense_change(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return scale × B A, (outputs, ...), in double precision; arguments as for ``squared_change``."""
    wide = torch.complex128 if a.is_complex() else torch.float64
    change = scale * b.flatten(1).to(wide) @ a.flatten(1).to(wide)
    return change.view(len(b), *a.shape[1:])
