"""The quadratic pull on all parameters of a device at once, by one program."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from conservtl.kernels.chunks import Pulled
from conservtl.kernels.fused.launch import add_pull, lerp
from conservtl.kernels.fused.members import Members
from conservtl.kernels.fused.stream import AnchorStream, streams
from conservtl.kernels.shares import kept

__all__ = ["FusedPull"]


class FusedPull:
    """Parameters of one device and type that are pulled together, whatever their strengths and rates.

    Args:
        items: at least one; all with an anchor, of one type and device, or none with one, and the same for importances.
    """

    def __init__(self, items: Sequence[Pulled]) -> None:
        first, parameters = items[0], [item.parameter for item in items]
        anchors = None if first.anchor is None else [item.anchor for item in items if item.anchor is not None]
        importances = None if first.importance is None else [item.importance for item in items]
        streamed = anchors is not None and streams(first)
        self._members = Members(parameters, None if streamed else anchors, importances)
        self._stream = AnchorStream(self._members, anchors) if streamed and anchors else None
        self._strengths = [item.strength for item in items]
        self._every = first.every
        self._groups = [item.group for item in items]

    @torch.no_grad()
    def add_gradients(self, factor: float = 1.0, scale: Tensor | None = None) -> None:
        """Add factor × scale × strength × importance × (w - anchor) to each gradient, as ``Pull`` does."""
        if factor:
            amounts = [factor * self._every * strength for strength in self._strengths]
            add_pull(self._members, self._members.amounts.of(amounts), scale, self._stream)

    @torch.no_grad()
    def move_weights(self, factor: float = 1.0, skip: Tensor | None = None) -> None:
        """Move each weight by rate × factor × strength × (anchor - w), as ``Pull`` does."""
        if self._groups[0] is None or not factor:
            return
        lerp(self._members, self._amounts(factor), skip, self._every, self._stream)

    def _amounts(self, factor: float) -> Tensor:
        """Return the share of the way that each parameter goes, before importances."""
        rates: list[Any] = [group["lr"] for group in self._groups if group is not None]
        every = self._every if self._members.importances is None else 1  # else the program takes the power
        if not any(isinstance(rate, Tensor) for rate in rates):
            pairs = zip(rates, self._strengths, strict=True)
            return self._members.amounts.of([kept(rate * factor * strength, every) for rate, strength in pairs])
        strengths = self._members.amounts.of([factor * strength for strength in self._strengths])
        placed = [torch.as_tensor(rate).to(self._members.device, torch.float64, non_blocking=True) for rate in rates]
        shares: Tensor = kept(torch.stack([rate.reshape(()) for rate in placed]) * strengths, every)
        return shares
