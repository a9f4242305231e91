"""Launches of the programs on ``Members``: one for each kind of work."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch
import triton.language as tl
from torch import Tensor

from conservtl.kernels.fused import programs
from conservtl.kernels.fused.members import BLOCK, SPAN, Members
from conservtl.kernels.fused.table import Blocks
from conservtl.kernels.philox import DRAWN

__all__ = [
    "Terms",
    "add_pull",
    "lerp",
    "mix",
    "range_sums",
    "row_norms",
    "rows_into_balls",
    "shrink_rows",
    "soften",
    "sums",
    "unmix",
]

Terms = Literal["move, start", "move, start, absolute", "move, gradient", "weight, gradient"]
"""The two sums that ``sums`` makes: of squares, absolute values or products of the named."""

_TYPES: dict[torch.dtype, Any] = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


def add_pull(
    members: Members, amounts: Tensor, scale: Tensor | None, parts: Iterable[tuple[Blocks, Tensor]] | None = None
) -> None:
    """Add amount × scale × importance × (w - w0) to the gradients; those missing are made.

    Args:
        members: the parameters.
        amounts: one for each, (parameters,), in double precision.
        scale: scalar tensor; None: 1.
        parts: blocks with the addresses of their anchors, in turn; None: all blocks with the members' own.
    """
    gradients, aligned = members.gradients(made=True)
    carried = amounts if scale is None else _beside(scale, members)
    for blocks, anchors in [(members.blocks, members.anchor_table)] if parts is None else parts:
        _run(
            programs.add_pull, members, blocks, members.weight_table, anchors, members.importance_table, gradients,
            amounts, carried, *_types(members), _TYPES[members.accumulate], members.anchored or parts is not None,
            members.importances is not None, scale is not None, aligned, BLOCK,
        )  # fmt: skip


def lerp(
    members: Members, amounts: Tensor, skip: Tensor | None = None, every: int = 1,
    parts: Iterable[tuple[Blocks, Tensor]] | None = None,
) -> None:  # fmt: skip
    """Move the weights by shares of the way to their anchors, or to zero.

    Args:
        members: the parameters.
        amounts: one for each, (parameters,); times the importances, at most 1.
        skip: scalar tensor, non-zero if nothing is to move.
        every: number of steps in one, if there are importances.
        parts: as for ``add_pull``.
    """
    carried = amounts if skip is None else _beside(skip, members)
    for blocks, anchors in [(members.blocks, members.anchor_table)] if parts is None else parts:
        _run(
            programs.lerp, members, blocks, members.weight_table, anchors, members.importance_table, amounts, carried,
            *_types(members), _TYPES[members.accumulate], members.anchored or parts is not None,
            members.importances is not None, skip is not None, every, members.aligned, BLOCK,
        )  # fmt: skip


def soften(members: Members, thresholds: Tensor, skip: Tensor | None) -> None:
    """Move each element by its tensor's threshold toward the anchor and no further.

    Args:
        members: the parameters.
        thresholds: one for each, (parameters,), in double precision.
        skip: scalar tensor, non-zero if nothing is to move.
    """
    carried = thresholds if skip is None else _beside(skip, members)
    _run(
        programs.soften, members, members.blocks, members.weight_table, members.anchor_table, thresholds, carried,
        *_types(members)[:2], _TYPES[members.accumulate], skip is not None, members.aligned, BLOCK,
    )  # fmt: skip


def sums(members: Members, terms: Terms) -> Tensor:
    """Return two sums over each parameter, (2, parameters), on its device; a missing gradient counts as zero."""
    gradients, aligned = members.weight_table, members.aligned
    if "gradient" in terms:
        gradients, aligned = members.gradients(made=False)
    count = members.spans.count
    parts = torch.empty((2, count), dtype=members.accumulate, device=members.device)
    _run(
        programs.sums, members, members.spans, members.weight_table, members.anchor_table, gradients, parts, count,
        *_types(members)[:2], _TYPES[members.accumulate], terms, aligned, BLOCK, SPAN,
    )  # fmt: skip
    return range_sums(parts, members.spans.ends)


def range_sums(values: Tensor, ends: Tensor, *, largest: bool = False) -> Tensor:
    """Return the sum, or the largest, of each range of neighbouring values.

    Args:
        values: (vectors, values), at least 0 if the largest are wanted.
        ends: where the ranges end, beginning with 0; (ranges + 1,).
        largest: whether to return the largest value of a range; 0 for an empty one.
    """
    vectors, total = values.shape
    count = len(ends) - 1
    out = torch.empty((vectors, count), dtype=values.dtype, device=values.device)
    if count:
        with _device(values.device):
            programs.range_sums[count, vectors](values, ends, out, count, total, _TYPES[values.dtype], largest, 256)
    return out


def row_norms(
    members: Members, blocks: Blocks, lengths: Tensor, bases: Tensor, out: Tensor, shape: tuple[bool, int, int]
) -> None:
    """Write the sums of absolute values of rows of w - w0, and of w0.

    Args:
        members: the tensors.
        blocks: of rows.
        lengths: elements of a row, for each tensor.
        bases: place of each tensor's first row in ``out``.
        out: (2, rows).
        shape: whether all lengths are multiples of 16 at aligned addresses; rows and columns that a program handles
            at once.
    """
    _run(
        programs.row_norms, members, blocks, lengths, bases, members.weight_table, members.anchor_table, out,
        out.shape[1], *_types(members)[:2], _TYPES[members.accumulate], True, *shape,
    )  # fmt: skip


def shrink_rows(
    members: Members,
    blocks: Blocks,
    lengths: Tensor,
    thresholds: Tensor,
    skip: Tensor | None,
    shape: tuple[bool, int, int],
) -> None:
    """Move rows toward their anchors by threshold × root of the length, and no further; arguments as above."""
    carried = thresholds if skip is None else _beside(skip, members)
    _run(
        programs.shrink_rows, members, blocks, lengths, members.weight_table, members.anchor_table, thresholds,
        carried, *_types(members)[:2], _TYPES[members.accumulate], False, False, False, skip is not None, *shape,
    )  # fmt: skip


def rows_into_balls(
    members: Members, blocks: Blocks, lengths: Tensor, radii: Tensor, shape: tuple[bool, int, int], *,
    absolute: bool, relative: bool,
) -> None:  # fmt: skip
    """Move rows into balls around their anchors; arguments as above, and as ``RowBlocks.into_balls``."""
    _run(
        programs.shrink_rows, members, blocks, lengths, members.weight_table, members.anchor_table, radii, radii,
        *_types(members)[:2], _TYPES[members.accumulate], absolute, True, relative, False, *shape,
    )  # fmt: skip


def mix(members: Members, identities: Tensor, plains: Tensor, seed: int, step: int, dropped: int) -> None:
    """Put the mixed weights in place of the plain ones, which are copied.

    Args:
        members: the parameters with their anchors.
        identities: a number for each parameter by which its mask is drawn, (parameters,), int64.
        plains: addresses of the copies.
        seed: of the masks.
        step: number of the step.
        dropped: number of 65,536 levels that mean the source value.
    """
    _run(
        programs.mix, members, members.drawn, identities, members.weight_table, members.anchor_table, plains, seed,
        step, dropped, *_types(members)[:2], _TYPES[members.accumulate], members.aligned, DRAWN,
    )  # fmt: skip


def unmix(members: Members, identities: Tensor, which: Sequence[bool], seed: int, step: int, dropped: int) -> None:
    """Multiply the gradients of those that were mixed by their masks; arguments as for ``mix``."""
    gradients, aligned = members.gradients(made=False, which=which)
    _run(
        programs.unmix, members, members.drawn, identities, gradients, seed, step, dropped, _TYPES[members.dtype],
        _TYPES[members.accumulate], aligned, DRAWN,
    )  # fmt: skip


def _run(program: Any, members: Members, blocks: Blocks, *arguments: Any) -> None:
    """Run a program on all blocks, on the members' device."""
    if blocks.count:
        with _device(members.device):
            program[blocks.count,](blocks.entries, blocks.starts, blocks.sizes, *arguments)


def _device(device: torch.device) -> Any:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _types(members: Members) -> Sequence[Any]:
    """Return the types of weights, anchors and importances, as Triton names them."""
    anchor = members.dtype if members.anchors is None else members.anchors[0].dtype
    importance = members.dtype if members.importances is None else members.importances[0].dtype
    return _TYPES[members.dtype], _TYPES[anchor], _TYPES[importance]


def _beside(scalar: Tensor, members: Members) -> Tensor:
    """Return a scalar on the members' device; a copy from the CPU does not block."""
    return scalar.to(members.device, non_blocking=scalar.device.type == "cpu").reshape(())
