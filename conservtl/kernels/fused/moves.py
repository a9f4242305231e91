"""The work of updates on all their parameters at once: sums over tensors, moves toward the source, and rows."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate, chain
from typing import Any, Literal

import torch
from torch import Tensor

from conservtl.kernels.backend import fused_on
from conservtl.kernels.dtensor import local, over_parts, sharded
from conservtl.kernels.fused import launch
from conservtl.kernels.fused.members import Members, fits, in_rows
from conservtl.kernels.fused.mixing import Mixing
from conservtl.kernels.fused.rates import Rates
from conservtl.kernels.fused.row_blocks import LONGEST, RowBlocks
from conservtl.kernels.fused.table import uploaded
from conservtl.plan.update import Moving

__all__ = ["Moves", "moves_of"]


class Moves:
    """Parameters of an update, grouped by device and type."""

    def __init__(self, moving: Sequence[Moving]) -> None:
        alike: dict[Any, list[int]] = {}
        for at, item in enumerate(moving):
            weight = local(item.parameter)
            anchored = None if item.anchor is None else item.anchor.dtype
            alike.setdefault((weight.device, weight.dtype, anchored), []).append(at)
        self._places = list(alike.values())
        self._parameters = [item.parameter for item in moving]
        self._labels: tuple[list[str], Tensor] | None = None
        self._spans: tuple[list[str], Tensor, Tensor] | None = None
        self._sharded = any(map(sharded, self._parameters))
        self.groups = [_Group(moving, places) for places in self._places]

    @property
    def whole(self) -> bool:
        """Whether programs do all of the work: parameters of one device and type, none of them sharded."""
        return len(self.groups) == 1 and not self._sharded

    def sums(self, terms: launch.Terms, kind: Literal["sum", "roots", "root"] = "sum") -> tuple[Tensor, Tensor]:
        """Return two sums over each whole parameter, (parameters,) each, on the device of the first.

        ``kind``: roots for those of both sums, root for that of the first.
        """
        if self.whole:
            one, two = launch.sums(self.groups[0].members, terms, kind)
            return one, two
        found = [launch.sums(group.members, terms) for group in self.groups]
        both = found[0] if len(found) == 1 else self._joined(found)
        one, two = (over_parts(vector, self._parameters) for vector in both) if self._sharded else both
        return one if kind == "sum" else one.sqrt(), two.sqrt() if kind == "roots" else two

    def decay(self, before: Tensor, products: Tensor, strength: float, sign: int) -> None:
        """Move parameters toward their anchors by strength × the share of the distance that they have gained.

        ``before`` are the distances before the step. Where sign × product is not positive nothing moves.
        """
        (members,) = (group.members for group in self.groups)
        values = launch.span_sums(members, "move, start")
        shares = launch.decay_shares(
            members, values, before.to(members.device), products.to(members.device), strength, sign
        )
        launch.lerp(members, (shares, 1.0))

    def layer_ratios(self, layers: Sequence[str], scale: Tensor | None, before: Tensor | None) -> Tensor:
        """Return the ratio of each layer's norms, of gradients to weights, and 1; added to those of steps before."""
        (members,) = (group.members for group in self.groups)
        if self._spans is None or self._spans[0] != layers:
            self._spans = list(layers), *_by_layer(members, layers)
        parts = launch.span_sums(members, "weight, gradient")
        norms = launch.range_sums(parts, self._spans[2], "roots", self._spans[1])
        device = members.device
        scale = None if scale is None else scale.to(device).reshape(())
        return launch.ratios(norms, scale, None if before is None else before.to(device))

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
            launch.lerp(group.members, (own, 1.0))

    def soften(self, strength: float, skip: Tensor | None) -> None:
        """Move each element toward the anchor by rate × strength and no further."""
        for group in self.groups:
            launch.soften(group.members, group.rates.times(strength), skip)

    def shrink_rows(self, strength: float, skip: Tensor | None) -> None:
        """Move each row toward the anchor by rate × strength × the root of its length, and no further."""
        for group in self.groups:
            group.rows.shrink(group.rates.times(strength), skip)

    def rows_into_balls(self, radius: float, *, absolute: bool, relative: bool) -> None:
        """Move each row into a ball around its anchor; arguments as ``RowBlocks.into_balls``."""
        for group in self.groups:
            group.rows.into_balls(group.rates.without(radius), absolute=absolute, relative=relative)

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
        self.rates = Rates([item.group for item in moving], [1.0] * len(moving), self.members.device)

    @cached_property
    def rows(self) -> RowBlocks:
        return RowBlocks(self.members)


def _by_layer(members: Members, layers: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Return the spans of the parameters layer by layer, in the order of their first use, and where the layers end."""
    spans: dict[str, list[int]] = {layer: [] for layer in layers}
    begins = accumulate(members.spans.counts, initial=0)
    for layer, begin, count in zip(layers, begins, members.spans.counts, strict=False):
        spans[layer] += range(begin, begin + count)
    ends = [0, *accumulate(map(len, spans.values()))]
    order = list(chain.from_iterable(spans.values()))
    return uploaded(order, torch.int32, members.device), uploaded(ends, torch.int32, members.device)


def moves_of(moving: Sequence[Moving], *, rows: bool, new: bool, short: bool) -> tuple[Moves | None, list[Moving]]:
    """Return the parameters that programs can act on, and the rest; arguments as for ``split``."""
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
