"""The work of updates on all their parameters at once: sums over tensors, moves toward the source, and rows."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from conservtl.kernels.backend import fused_on
from conservtl.kernels.dtensor import local, over_parts, sharded
from conservtl.kernels.fused import launch
from conservtl.kernels.fused.members import Members, fits, in_rows
from conservtl.kernels.fused.mixing import Mixing
from conservtl.kernels.fused.row_blocks import LONGEST, RowBlocks
from conservtl.kernels.fused.table import uploaded
from conservtl.plan.update import Moving

__all__ = ["Moves", "moves_of"]


class Moves:
    """Parameters of an update, grouped by device and type.

    Args:
        moving: the parameters that programs can act on.
    """

    def __init__(self, moving: Sequence[Moving]) -> None:
        alike: dict[Any, list[int]] = {}
        for at, item in enumerate(moving):
            weight = local(item.parameter)
            anchored = None if item.anchor is None else item.anchor.dtype
            alike.setdefault((weight.device, weight.dtype, anchored), []).append(at)
        self._places = list(alike.values())
        self._parameters = [item.parameter for item in moving]
        self._labels: tuple[list[str], Tensor] | None = None
        self._sharded = any(map(sharded, self._parameters))
        self.groups = [_Group(moving, places) for places in self._places]

    def sums(self, terms: launch.Terms) -> tuple[Tensor, Tensor]:
        """Return two sums over each whole parameter, (parameters,) each, on the device of the first."""
        found = [launch.sums(group.members, terms) for group in self.groups]
        both = found[0] if len(found) == 1 else self._joined(found)
        if self._sharded:
            one, two = (over_parts(vector, self._parameters) for vector in both)
            return one, two
        return both[0], both[1]

    def largest_rows(self) -> tuple[Tensor, Tensor]:
        """Return the largest sum of absolute values of a row of w - w0, and of w0, (parameters,) each."""
        found = [group.rows.largest() for group in self.groups]
        both = found[0] if len(found) == 1 else self._joined(found)
        if self._sharded:
            one, two = (over_parts(vector, self._parameters, largest=True) for vector in both)
            return one, two
        return both[0], both[1]

    def over(self, labels: Sequence[str], sums: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return sums over all parameters with the same label, (labels,) each, in the order of their first use."""
        if self._labels is None or self._labels[0] != labels:
            numbers = {label: number for number, label in enumerate(dict.fromkeys(labels))}
            member = torch.zeros((len(labels), len(numbers)), dtype=torch.float64)
            member[range(len(labels)), [numbers[label] for label in labels]] = 1
            self._labels = list(labels), uploaded(member.tolist(), torch.float64, sums[0].device)
        one, two = torch.stack(sums).double() @ self._labels[1]  # always in the same order, unlike index_add
        return one.to(sums[0].dtype), two.to(sums[1].dtype)

    def lerp(self, shares: Tensor) -> None:
        """Move each parameter by its share of the way to the anchor; (parameters,)."""
        for group in self.groups:
            own = shares if len(self.groups) == 1 else shares.to(group.members.device).index_select(0, group.places)
            launch.lerp(group.members, own)

    def soften(self, strength: float, skip: Tensor | None) -> None:
        """Move each element toward the anchor by rate × strength and no further."""
        for group in self.groups:
            launch.soften(group.members, group.rates(strength), skip)

    def shrink_rows(self, strength: float, skip: Tensor | None) -> None:
        """Move each row toward the anchor by rate × strength × the root of its length, and no further."""
        for group in self.groups:
            group.rows.shrink(group.rates(strength), skip)

    def rows_into_balls(self, radius: float, *, absolute: bool, relative: bool) -> None:
        """Move each row into a ball around its anchor; arguments as ``RowBlocks.into_balls``."""
        for group in self.groups:
            radii = group.members.amounts.of([radius] * len(group.members.sizes))
            group.rows.into_balls(radii, absolute=absolute, relative=relative)

    @cached_property
    def mixing(self) -> list[Mixing]:
        """The parameters as they are mixed with their anchors."""
        return [Mixing(group.members, group.names) for group in self.groups]

    def _joined(self, found: Sequence[Tensor]) -> Tensor:
        """Return sums of all groups in the order of the parameters."""
        device = found[0].device
        everything = torch.cat([one.to(device, found[0].dtype) for one in found], 1)
        return everything.index_select(1, self._order)

    @cached_property
    def _order(self) -> Tensor:
        places = [at for group in self._places for at in group]
        order = sorted(range(len(places)), key=places.__getitem__)
        return uploaded(order, torch.int64, self.groups[0].members.device)


class _Group:
    """Parameters of one device and type."""

    def __init__(self, everything: Sequence[Moving], places: Sequence[int]) -> None:
        moving = [everything[at] for at in places]
        anchors = None if moving[0].anchor is None else [item.anchor for item in moving]
        self.members = Members([item.parameter for item in moving], anchors)
        self.places = uploaded(places, torch.int64, self.members.device)
        self.names = [item.name for item in moving]
        self._groups = [item.group for item in moving]

    @cached_property
    def rows(self) -> RowBlocks:
        return RowBlocks(self.members)

    def rates(self, strength: float) -> Tensor:
        """Return rate × strength of each parameter."""
        rates: list[Any] = [group["lr"] for group in self._groups]
        if not any(isinstance(rate, Tensor) for rate in rates):
            return self.members.amounts.of([rate * strength for rate in rates])
        placed = [torch.as_tensor(rate).to(self.members.device, torch.float64, non_blocking=True) for rate in rates]
        return torch.stack([rate.reshape(()) for rate in placed]) * strength


def moves_of(moving: Sequence[Moving], *, rows: bool, new: bool, short: bool) -> tuple[Moves | None, list[Moving]]:
    """Return the parameters that programs can act on, and the rest.

    Args:
        moving: all parameters.
        rows: whether rows are acted on, which must follow each other in memory.
        new: whether parameters with rows of new labels can be acted on.
        short: whether rows must be short enough for one program.
    """
    able = [
        item
        for item in moving
        if fused_on(local(item.parameter).device)
        and fits(item.parameter, item.anchor)
        and (new or item.new is None)
        and (not rows or in_rows(local(item.parameter)))
        and (not short or _row_length(local(item.parameter)) <= LONGEST)
    ]
    chosen = set(map(id, able))
    return (Moves(able) if able else None), [item for item in moving if id(item) not in chosen]


def _row_length(weight: Tensor) -> int:
    return weight.shape[1:].numel() if weight.ndim else 1
