"""The quadratic pull on all parameters of a device at once, by one program."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from conservtl.kernels.chunks import Pulled
from conservtl.kernels.fused.launch import add_pull, lerp
from conservtl.kernels.fused.members import Members
from conservtl.kernels.fused.stream import AnchorStream, streams
from conservtl.kernels.fused.table import uploaded
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
        groups = {id(item.group): item.group for item in items if item.group is not None}
        self._distinct = list(groups.values())
        numbers = {key: number for number, key in enumerate(groups)}
        self._places = [numbers.get(id(item.group), 0) for item in items]
        self._last: tuple[tuple[float, ...], Tensor] | None = None

    @torch.no_grad()
    def add_gradients(self, factor: float = 1.0, scale: Tensor | None = None) -> None:
        """Add factor × scale × strength × importance × (w - anchor) to each gradient, as ``Pull`` does."""
        if factor:
            add_pull(self._members, self._sent((factor,), factor * self._every), scale, self._stream)

    @torch.no_grad()
    def move_weights(self, factor: float = 1.0, skip: Tensor | None = None) -> None:
        """Move each weight by rate × factor × strength × (anchor - w), as ``Pull`` does."""
        if not self._distinct or not factor:
            return
        lerp(self._members, self._amounts(factor), skip, self._every, self._stream)

    def _amounts(self, factor: float) -> Tensor:
        """Return the share of the way that each parameter goes, before importances."""
        rates: list[Any] = [group["lr"] for group in self._distinct]
        every = self._every if self._members.importances is None else 1  # else the program takes the power
        if not any(isinstance(rate, Tensor) for rate in rates):
            return self._sent((factor, *rates), factor, rates, every)
        strengths = self._sent((factor,), factor)
        placed = [torch.as_tensor(rate).to(self._members.device, torch.float64, non_blocking=True) for rate in rates]
        each = torch.stack([rate.reshape(()) for rate in placed])
        each = each.expand(len(self._places)) if len(placed) == 1 else each.index_select(0, self._place_table)
        shares: Tensor = kept(each * strengths, every)
        return shares

    def _sent(
        self, key: tuple[float, ...], factor: float, rates: Sequence[float] | None = None, every: int = 1
    ) -> Tensor:
        """Return factor × rate × strength of each parameter on the device; sent again if ``key`` has changed."""
        if self._last is None or self._last[0] != key:
            each = [1.0] * len(self._places) if rates is None else [rates[place] for place in self._places]
            pairs = zip(each, self._strengths, strict=True)
            amounts = [kept(rate * factor * strength, every) for rate, strength in pairs]
            self._last = key, self._members.amounts.of(amounts)
        return self._last[1]

    @cached_property
    def _place_table(self) -> Tensor:
        return uploaded(self._places, torch.int64, self._members.device)
