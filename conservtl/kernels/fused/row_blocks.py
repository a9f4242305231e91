"""Rows of many tensors, in blocks for programs: several short rows to a block, one long row to a program."""

from __future__ import annotations

from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from conservtl.kernels.fused import launch
from conservtl.kernels.fused.members import Members
from conservtl.kernels.fused.table import Blocks, uploaded

__all__ = ["LONGEST", "RowBlocks"]

LONGEST = 1 << 15
"""Elements of the longest row that one program goes through; the rows of a longer one are tensors of their own."""
_SHAPES = ((16, 64), (128, 8), (LONGEST, 1))
"""Longest row and number of rows of a block."""


class RowBlocks:
    """Rows of tensors that follow each other in memory, a row being a slice at one index of the first dimension."""

    def __init__(self, members: Members) -> None:
        self._members = members
        self._rows = [weight.shape[0] if weight.ndim else 1 for weight in members.weights]
        lengths = [size // rows if rows else 0 for size, rows in zip(members.sizes, self._rows, strict=True)]
        self._lengths = uploaded(lengths, torch.int64, members.device)
        classes = [next((n for n, (most, _) in enumerate(_SHAPES) if length <= most), None) for length in lengths]
        even = [members.aligned and length % 16 == 0 for length in lengths]
        self._blocks: list[tuple[Blocks, tuple[bool, int, int]]] = []
        for kind in sorted({(one, is_even) for one, is_even in zip(classes, even, strict=True) if one is not None}):
            most, rows = _SHAPES[kind[0]]
            places = zip(self._rows, classes, even, strict=True)
            own = [count if (one, is_even) == kind else 0 for count, one, is_even in places]
            self._blocks.append((Blocks(own, rows, members.device), (kind[1], rows, min(most, 1024))))
        self._blocks.sort(key=lambda one: -one[0].count)  # the host launches the small ones while the largest runs
        self._long = [at for at, one in enumerate(classes) if one is None]

    def largest(self) -> Tensor:
        """Return the largest sum of absolute values of a row of w - w0, and of w0: (2, tensors). No row is long."""
        ends = [0, *accumulate(self._rows)]
        found = torch.zeros((2, ends[-1]), dtype=self._members.accumulate, device=self._members.device)
        for blocks, shape in self._blocks:
            launch.row_norms(self._members, blocks, self._lengths, self._bases, found, shape)
        return launch.range_sums(found, self._ends, "largest")

    def shrink(self, thresholds: launch.Amounts, skip: Tensor | None) -> None:
        """Move each row toward its anchor by its tensor's threshold times the root of its length, and no further."""
        for blocks, shape in self._blocks:
            launch.move_rows(self._members, blocks, self._lengths, thresholds, shape, skip=skip)
        if self._long:
            long, owners = self._long_rows
            size = launch.sums(long, "move, start", "root")[0]
            table, factor = thresholds
            roots = torch.sqrt(self._lengths[owners].to(torch.float64))
            shares = ((table[owners] * factor * roots) / size.clamp(min=_TINY)).clamp(max=1)
            launch.lerp(long, (shares, 1.0), skip)

    def into_balls(self, radii: launch.Amounts, *, absolute: bool, relative: bool) -> None:
        """Move each row into a ball around its anchor, of its tensor's radius.

        The norm is the sum of absolute values if ``absolute``; radii are ratios to the anchor's row if ``relative``.
        """
        for blocks, shape in self._blocks:
            launch.move_rows(
                self._members, blocks, self._lengths, radii, shape, ball=True, absolute=absolute, relative=relative
            )
        if self._long:
            long, owners = self._long_rows
            both = launch.sums(long, "move, start, absolute" if absolute else "move, start")
            size, start = both if absolute else both.sqrt()
            limit = radii[0][owners] * radii[1]
            limit = limit * start if relative else limit
            launch.lerp(long, ((1 - limit / size.clamp(min=_TINY)).clamp(min=0), 1.0))

    @cached_property
    def _bases(self) -> Tensor:
        """Place of each tensor's first row among all rows."""
        return uploaded([0, *accumulate(self._rows)][:-1], torch.int64, self._members.device)

    @cached_property
    def _ends(self) -> Tensor:
        return uploaded([0, *accumulate(self._rows)], torch.int32, self._members.device)

    @cached_property
    def _long_rows(self) -> tuple[Members, Tensor]:
        """Long rows as tensors of their own, and the tensor that each is of."""
        weights = [row for at in self._long for row in self._members.weights[at]]
        anchors = [row for at in self._long for row in (self._members.anchors or [])[at]]
        owners = [at for at in self._long for _ in range(self._rows[at])]
        return Members(weights, anchors), uploaded(owners, torch.int64, self._members.device)


_TINY = torch.finfo(torch.float32).tiny
