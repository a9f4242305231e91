"""Norms of rows, and rows that move toward the source."""

import triton
import triton.language as tl

from conservtl.kernels.fused.programs._parts import TINY, factored, pointer, toward, wide

__all__ = ["row_norms", "shrink_rows"]


@triton.jit
def _row_norm(total, ABSOLUTE: tl.constexpr):
    norm = tl.sum(total, 1)
    if not ABSOLUTE:
        norm = tl.sqrt(norm)
    return norm


@triton.jit
def row_norms(
    entries, starts, sizes, lengths, bases, weights, anchors, out, programs,
    W: tl.constexpr, A: tl.constexpr, ACC: tl.constexpr, ABSOLUTE: tl.constexpr, EVEN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write the norms of rows of weight - anchor, and of the anchor."""
    program = tl.program_id(0)
    entry = tl.load(entries + program)
    rows = tl.load(sizes + entry)
    length = tl.load(lengths + entry)
    if EVEN:
        length = tl.multiple_of(length, 16)
    weight = pointer(weights, entry, W, EVEN)
    anchor = pointer(anchors, entry, A, EVEN)
    row = tl.load(starts + program) + tl.arange(0, ROWS)
    first = tl.zeros([ROWS, COLUMNS], ACC)
    second = tl.zeros([ROWS, COLUMNS], ACC)
    block = 0
    while block < length:
        column = block + tl.arange(0, COLUMNS)
        at = row[:, None] * length + column[None, :]
        inside = (row[:, None] < rows) & (column[None, :] < length)
        start = wide(tl.load(anchor + at, mask=inside, other=0.0), ACC)
        move = wide(tl.load(weight + at, mask=inside, other=0.0), ACC) - start
        if ABSOLUTE:
            first += tl.abs(move)
            second += tl.abs(start)
        else:
            first += move * move
            second += start * start
        block += COLUMNS
    base = tl.load(bases + entry)
    tl.store(out + base + row, _row_norm(first, ABSOLUTE), mask=row < rows)
    tl.store(out + programs + base + row, _row_norm(second, ABSOLUTE), mask=row < rows)


@triton.jit
def shrink_rows(
    entries, starts, sizes, lengths, weights, anchors, amounts, skip, high, low,
    W: tl.constexpr, A: tl.constexpr, ACC: tl.constexpr, ABSOLUTE: tl.constexpr, BALL: tl.constexpr,
    RELATIVE: tl.constexpr, SKIPPED: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Move each row toward the anchor: into a ball around it, or by a threshold and no further."""
    program = tl.program_id(0)
    entry = tl.load(entries + program)
    rows = tl.load(sizes + entry)
    length = tl.load(lengths + entry)
    if EVEN:
        length = tl.multiple_of(length, 16)
    weight = pointer(weights, entry, W, EVEN)
    anchor = pointer(anchors, entry, A, EVEN)
    amount = factored(amounts, entry, high, low).to(ACC)
    if SKIPPED:
        amount = tl.where(tl.load(skip) == 0, amount, 0.0)
    row = tl.load(starts + program) + tl.arange(0, ROWS)
    first = tl.zeros([ROWS, COLUMNS], ACC)
    second = tl.zeros([ROWS, COLUMNS], ACC)
    block = 0
    while block < length:
        column = block + tl.arange(0, COLUMNS)
        at = row[:, None] * length + column[None, :]
        inside = (row[:, None] < rows) & (column[None, :] < length)
        start = wide(tl.load(anchor + at, mask=inside, other=0.0), ACC)
        move = wide(tl.load(weight + at, mask=inside, other=0.0), ACC) - start
        if ABSOLUTE:
            first += tl.abs(move)
        else:
            first += move * move
        if RELATIVE:
            second += tl.abs(start) if ABSOLUTE else start * start
        block += COLUMNS
    norm = _row_norm(first, ABSOLUTE)
    norm = tl.where(norm < TINY, TINY, norm)
    if BALL:
        radius = amount * _row_norm(second, ABSOLUTE) if RELATIVE else amount
        share = 1 - radius / norm
        share = tl.where(share < 0, 0.0, share)
    else:
        share = amount * tl.sqrt(length.to(ACC)) / norm
        share = tl.where(share > 1, 1.0, share)
    block = 0
    while block < length:
        column = block + tl.arange(0, COLUMNS)
        at = row[:, None] * length + column[None, :]
        inside = (row[:, None] < rows) & (column[None, :] < length)
        start = wide(tl.load(anchor + at, mask=inside, other=0.0), ACC)
        value = wide(tl.load(weight + at, mask=inside, other=0.0), ACC)
        tl.store(weight + at, toward(value, start, share[:, None]).to(W), mask=inside)

        block += COLUMNS
