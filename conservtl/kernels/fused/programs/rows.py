"""Norms of rows, and rows that move toward the source."""

import triton
import triton.language as tl

from conservtl.kernels.fused.programs._parts import TINY, factored, pointer, toward, unless, wide

__all__ = ["row_norms", "shrink_rows"]


@triton.jit
def _rows(
    entries, starts, sizes, lengths, weights, anchors,
    W: tl.constexpr, A: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    # The tensor of this program, the number and length of its rows, its addresses, and the rows of the block.
    program = tl.program_id(0)
    entry = tl.load(entries + program)
    length = tl.load(lengths + entry)
    if EVEN:
        length = tl.multiple_of(length, 16)
    row = tl.load(starts + program) + tl.arange(0, ROWS)
    weight = pointer(weights, entry, W, EVEN)
    return entry, tl.load(sizes + entry), length, weight, pointer(anchors, entry, A, EVEN), row


@triton.jit
def _read(weight, anchor, row, rows, first, length, ACC: tl.constexpr, COLUMNS: tl.constexpr):
    # Places, whether they are inside, and values, of COLUMNS columns of the rows.
    column = first + tl.arange(0, COLUMNS)
    at = row[:, None] * length + column[None, :]
    inside = (row[:, None] < rows) & (column[None, :] < length)
    start = wide(tl.load(anchor + at, mask=inside, other=0.0), ACC)
    return at, inside, wide(tl.load(weight + at, mask=inside, other=0.0), ACC), start


@triton.jit
def _term(value, ABSOLUTE: tl.constexpr):
    return tl.abs(value) if ABSOLUTE else value * value


@triton.jit
def _norm(total, ABSOLUTE: tl.constexpr):
    norm = tl.sum(total, 1)
    return norm if ABSOLUTE else tl.sqrt(norm)


@triton.jit
def row_norms(
    entries, starts, sizes, lengths, bases, weights, anchors, out, programs,
    W: tl.constexpr, A: tl.constexpr, ACC: tl.constexpr, ABSOLUTE: tl.constexpr, EVEN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write the norms of rows of weight - anchor, and of the anchor."""
    entry, rows, length, weight, anchor, row = _rows(
        entries, starts, sizes, lengths, weights, anchors, W, A, EVEN, ROWS
    )
    moves = tl.zeros([ROWS, COLUMNS], ACC)
    anchored = tl.zeros([ROWS, COLUMNS], ACC)
    block = 0
    while block < length:
        _at, _inside, value, start = _read(weight, anchor, row, rows, block, length, ACC, COLUMNS)
        moves += _term(value - start, ABSOLUTE)
        anchored += _term(start, ABSOLUTE)
        block += COLUMNS
    base = tl.load(bases + entry)
    tl.store(out + base + row, _norm(moves, ABSOLUTE), mask=row < rows)
    tl.store(out + programs + base + row, _norm(anchored, ABSOLUTE), mask=row < rows)


@triton.jit
def shrink_rows(
    entries, starts, sizes, lengths, weights, anchors, amounts, skip, high, low,
    W: tl.constexpr, A: tl.constexpr, ACC: tl.constexpr, ABSOLUTE: tl.constexpr, BALL: tl.constexpr,
    RELATIVE: tl.constexpr, SKIPPED: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Move each row toward the anchor: into a ball around it, or by a threshold and no further."""
    entry, rows, length, weight, anchor, row = _rows(
        entries, starts, sizes, lengths, weights, anchors, W, A, EVEN, ROWS
    )
    amount = unless(skip, factored(amounts, entry, high, low).to(ACC), SKIPPED)
    moves = tl.zeros([ROWS, COLUMNS], ACC)
    anchored = tl.zeros([ROWS, COLUMNS], ACC)
    block = 0
    while block < length:
        _at, _inside, value, start = _read(weight, anchor, row, rows, block, length, ACC, COLUMNS)
        moves += _term(value - start, ABSOLUTE)
        if RELATIVE:
            anchored += _term(start, ABSOLUTE)
        block += COLUMNS
    norm = _norm(moves, ABSOLUTE)
    norm = tl.where(norm < TINY, TINY, norm)
    if BALL:
        radius = amount * _norm(anchored, ABSOLUTE) if RELATIVE else amount
        share = 1 - radius / norm
        share = tl.where(share < 0, 0.0, share)
    else:
        share = amount * tl.sqrt(length.to(ACC)) / norm
        share = tl.where(share > 1, 1.0, share)
    block = 0
    while block < length:
        at, inside, value, start = _read(weight, anchor, row, rows, block, length, ACC, COLUMNS)
        tl.store(weight + at, toward(value, start, share[:, None]).to(W), mask=inside)
        block += COLUMNS
