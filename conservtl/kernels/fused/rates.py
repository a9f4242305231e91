"""Rates of the optimizer's groups times a strength for each parameter, sent to the device only if they must be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from conservtl.kernels.fused.launch import Amounts
from conservtl.kernels.fused.table import uploaded

__all__ = ["Rates"]


class Rates:
    """Strengths of parameters and the groups that their rates are read from.

    The strengths stay on the device. A factor, or a rate that all groups share, goes to a program as a number; rates
    that differ are sent again if one has changed, and those on the device are multiplied there.
    """

    def __init__(
        self, groups: Sequence[Mapping[str, Any] | None], strengths: Sequence[float], device: torch.device
    ) -> None:
        self._device, self._strengths = device, list(strengths)
        distinct = {id(group): group for group in groups if group is not None}
        self.groups = list(distinct.values())
        numbers = {key: number for number, key in enumerate(distinct)}
        self._places = [numbers.get(id(group), 0) for group in groups]
        self._sent: tuple[list[float], Tensor] | None = None

    def without(self, factor: float) -> Amounts:
        """Return factor × strength of each parameter."""
        return self._table, factor

    def times(self, factor: float) -> Amounts:
        """Return rate × factor × strength of each parameter."""
        rates: list[Any] = [group["lr"] for group in self.groups]
        if any(isinstance(rate, Tensor) for rate in rates):
            return self._on_device(rates), factor
        if rates.count(rates[0]) == len(rates):
            return self._table, rates[0] * factor
        if self._sent is None or self._sent[0] != rates:
            each = [rates[place] * strength for place, strength in zip(self._places, self._strengths, strict=True)]
            self._sent = rates, uploaded(each, torch.float64, self._device)
        return self._sent[1], factor

    def _on_device(self, rates: Sequence[Any]) -> Tensor:
        placed = [torch.as_tensor(rate).to(self._device, torch.float64, non_blocking=True) for rate in rates]
        each = torch.stack([rate.reshape(()) for rate in placed])
        each = each if len(placed) == 1 else each.index_select(0, self._place_table)
        return each * self._table

    @cached_property
    def _table(self) -> Tensor:
        return uploaded(self._strengths, torch.float64, self._device)

    @cached_property
    def _place_table(self) -> Tensor:
        return uploaded(self._places, torch.int64, self._device)
