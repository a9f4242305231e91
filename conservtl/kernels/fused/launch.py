"""Launches of the programs on ``Members``: one for each kind of work.

Names mean the same in all of them: ``members`` are the parameters. ``amounts`` and ``thresholds`` hold one number for
each. ``scale`` is a scalar tensor, None for 1; ``skip`` is one that is not zero if nothing is to move. ``parts`` are
blocks with the addresses of their anchors, in turn; None: all blocks with the members' own. ``lengths`` are those of
the rows of each tensor, and ``shape`` is whether all are multiples of 16 at aligned addresses, and the rows and columns
that a program handles at once. Masks are drawn by ``identities``, a number for each parameter, ``seed`` and ``step``;
``dropped`` of 65,536 levels mean the source value, and ``plains`` are the addresses of copies of the plain weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from conservtl.kernels.fused import programs
from conservtl.kernels.fused.calls import call, parted
from conservtl.kernels.fused.members import BLOCK, SPAN, TYPES, Members
from conservtl.kernels.fused.table import Blocks
from conservtl.kernels.philox import DRAWN

__all__ = [
    "Amounts",
    "Terms",
    "add_pull",
    "decay_shares",
    "lerp",
    "mix",
    "move_rows",
    "range_sums",
    "ratios",
    "row_norms",
    "soften",
    "span_sums",
    "sums",
    "unmix",
]

Terms = Literal["move, start", "move, start, absolute", "move, gradient", "weight, gradient"]
"""The two sums that ``sums`` makes: of squares, absolute values or products of the named."""

Kind = Literal["sum", "roots", "root", "largest"]
Amounts = tuple[Tensor, float]
"""Numbers for each parameter, on its device, and a factor of all of them, which may differ from call to call."""


def add_pull(
    members: Members, amounts: Amounts, scale: Tensor | None, parts: Iterable[tuple[Blocks, Tensor]] | None = None
) -> None:
    """Add amount × scale × importance × (w - w0) to the gradients; those missing are made."""
    gradients, aligned = members.gradients(made=True)
    tensors = gradients, amounts[0], _beside(scale, members, amounts)
    _pull(programs.add_pull, members, parts, tensors, amounts, (scale is not None, aligned))


def lerp(
    members: Members, amounts: Amounts, skip: Tensor | None = None, every: int = 1,
    parts: Iterable[tuple[Blocks, Tensor]] | None = None,
) -> None:  # fmt: skip
    """Move the weights by ``every`` shares of the way to their anchors, or to zero; share × importance is at most 1."""
    tensors = amounts[0], _beside(skip, members, amounts)
    _pull(programs.lerp, members, parts, tensors, amounts, (skip is not None, every, members.aligned))


def _pull(
    program: Any, members: Members, parts: Iterable[tuple[Blocks, Tensor]] | None, tensors: Sequence[Tensor],
    amounts: Amounts, options: Sequence[Any],
) -> None:  # fmt: skip
    """Run a program on all blocks with the members' anchors, or on parts that bring theirs."""
    weighed, anchored = members.importances is not None, members.anchored or parts is not None
    constants = (*members.types, members.accumulated, anchored, weighed, *options, BLOCK)
    for blocks, anchors in [(members.blocks, members.anchor_table)] if parts is None else parts:
        all_tensors = members.weight_table, anchors, members.importance_table, *tensors
        _run(program, blocks, all_tensors, parted(amounts[1]), constants)


def soften(members: Members, thresholds: Amounts, skip: Tensor | None) -> None:
    """Move each element by its tensor's threshold toward the anchor and no further."""
    tensors = members.weight_table, members.anchor_table, thresholds[0], _beside(skip, members, thresholds)
    constants = (*members.types[:2], members.accumulated, skip is not None, members.aligned, BLOCK)
    _run(programs.soften, members.blocks, tensors, parted(thresholds[1]), constants)


def span_sums(members: Members, terms: Terms) -> Tensor:
    """Return two sums over each span of the parameters, (2, spans); a missing gradient counts as zero."""
    gradients, aligned = members.weight_table, members.aligned
    if "gradient" in terms:
        gradients, aligned = members.gradients(made=False)
    count = members.spans.count
    parts = torch.empty((2, count), dtype=members.accumulate, device=members.device)
    tensors = members.weight_table, members.anchor_table, gradients, parts
    constants = (*members.types[:2], members.accumulated, terms, aligned, BLOCK, SPAN)
    _run(programs.sums, members.spans, tensors, (count,), constants)
    return parts


def sums(members: Members, terms: Terms, kind: Kind = "sum") -> Tensor:
    """Return two sums over each parameter, (2, parameters), on its device, or their roots."""
    return range_sums(span_sums(members, terms), members.spans.ends, kind)


def range_sums(values: Tensor, ends: Tensor, kind: Kind = "sum", order: Tensor | None = None) -> Tensor:
    """Return the sum, its root, or the largest of each range of values.

    Args:
        values: (vectors, values), at least 0 if the largest are wanted.
        ends: where the ranges end, beginning with 0; (ranges + 1,), int32.
        kind: sum; roots; root, of the first vector's sums; largest: 0 for an empty range.
        order: values in the order in which ranges hold them, int32; None: as they are.
    """
    vectors, total = values.shape
    count = ends.shape[0] - 1
    out = torch.empty((vectors, count), dtype=values.dtype, device=values.device)
    if count:
        tensors = values, ends if order is None else order, ends, out
        constants = (TYPES[values.dtype], order is not None, kind, 256)
        call(programs.range_sums, (count, vectors), tensors, (count, total), constants)
    return out


def decay_shares(
    members: Members, values: Tensor, before: Tensor, products: Tensor, strength: float, sign: int
) -> Tensor:
    """Return min(1, strength × the share of its distance that a tensor has gained) where sign × product is positive.

    ``values`` are the squared distances of ``span_sums``, ``before`` the distances before the step.
    """
    out = torch.empty_like(before)
    tensors = values, members.spans.ends, before, products, out
    constants = (members.accumulated, 256)
    call(programs.decay_shares, (before.shape[0],), tensors, (*parted(strength), float(sign)), constants)
    return out


def ratios(norms: Tensor, scale: Tensor | None, sums: Tensor | None) -> Tensor:
    """Return ratios of norms, (2, layers), and 1, added to earlier sums: (layers + 1,).

    The second of a layer is divided by the scale and by the first; if that is 0 the ratio is -1. The sums stay if a
    ratio is not finite.
    """
    count = norms.shape[1]
    out = torch.empty(count + 1, dtype=norms.dtype, device=norms.device)
    carried = norms if scale is None else scale
    constants = (TYPES[norms.dtype], scale is not None, sums is not None, 1 << count.bit_length())
    call(programs.ratios, (1,), (norms, carried, norms if sums is None else sums, out), (count,), constants)
    return out


def row_norms(
    members: Members, blocks: Blocks, lengths: Tensor, bases: Tensor, out: Tensor, shape: tuple[bool, int, int]
) -> None:
    """Write the sums of absolute values of rows of w - w0, and of w0, to ``out``, (2, rows).

    The rows of a tensor begin at its place in ``bases``.
    """
    tensors = lengths, bases, members.weight_table, members.anchor_table, out
    _run(programs.row_norms, blocks, tensors, (out.shape[1],), (*members.types[:2], members.accumulated, True, *shape))


def move_rows(
    members: Members, blocks: Blocks, lengths: Tensor, amounts: Amounts, shape: tuple[bool, int, int], *,
    skip: Tensor | None = None, ball: bool = False, absolute: bool = False, relative: bool = False,
) -> None:  # fmt: skip
    """Move rows toward their anchors by amount × root of the length and no further, or as ``RowBlocks.into_balls``."""
    tensors = lengths, members.weight_table, members.anchor_table, amounts[0], _beside(skip, members, amounts)
    constants = (*members.types[:2], members.accumulated, absolute, ball, relative, skip is not None, *shape)
    _run(programs.shrink_rows, blocks, tensors, parted(amounts[1]), constants)


def mix(members: Members, identities: Tensor, plains: Tensor, seed: int, step: int, dropped: int) -> None:
    """Put the mixed weights in place of the plain ones, which are copied."""
    tensors = identities, members.weight_table, members.anchor_table, plains
    constants = (*members.types[:2], members.accumulated, members.aligned, DRAWN)
    _run(programs.mix, members.drawn, tensors, (seed, step, dropped), constants)


def unmix(
    members: Members, identities: Tensor, plains: Tensor | None, which: Sequence[bool] | None, seed: int, step: int,
    dropped: int,
) -> None:  # fmt: skip
    """Multiply the gradients of ``which`` were mixed, or of all, by their masks; put back ``plains`` if given."""
    gradients, aligned = members.gradients(made=False, which=which)
    table = members.weight_table
    tensors = identities, table, table if plains is None else plains, gradients
    constants = (members.types[0], members.accumulated, plains is not None, aligned, DRAWN)
    _run(programs.unmix, members.drawn, tensors, (seed, step, dropped), constants)


def _run(
    program: Any, blocks: Blocks, tensors: Sequence[Tensor], numbers: Sequence[float], constants: Sequence[Any]
) -> None:
    """Run a program on all blocks."""
    if blocks.count:
        call(program, (blocks.count,), (blocks.entries, blocks.starts, blocks.sizes, *tensors), numbers, constants)


def _beside(scalar: Tensor | None, members: Members, amounts: Amounts) -> Tensor:
    """Return a scalar on the members' device, by a copy that does not block; any tensor in the place of none."""
    if scalar is None:
        return amounts[0]
    return scalar.to(members.device, non_blocking=scalar.device.type == "cpu").reshape(())
