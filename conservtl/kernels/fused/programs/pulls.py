"""Pulls toward the source: on gradients, by shares of the way, by thresholds."""

import triton
import triton.language as tl

from conservtl.kernels.fused.programs._parts import factored, kept, own_block, pointer, read, toward, unless, write

__all__ = ["add_pull", "lerp", "soften"]


@triton.jit
def _add_pull(
    weight, anchor, importance, gradient, amount, at, size, W: tl.constexpr, ACC: tl.constexpr,
    ANCHORED: tl.constexpr, WEIGHED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    pull = read(weight, at, size, ACC, MASKED)
    if ANCHORED:
        pull -= read(anchor, at, size, ACC, MASKED)
    if WEIGHED:
        pull *= read(importance, at, size, ACC, MASKED)
    write(gradient, at, size, read(gradient, at, size, ACC, MASKED) + amount * pull, W, MASKED)


@triton.jit
def add_pull(
    entries, starts, sizes, weights, anchors, importances, gradients, amounts, scale, high, low,
    W: tl.constexpr, A: tl.constexpr, F: tl.constexpr, ACC: tl.constexpr,
    ANCHORED: tl.constexpr, WEIGHED: tl.constexpr, SCALED: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add factor × amount × importance × (weight - anchor) to each gradient."""
    entry, start, size = own_block(entries, starts, sizes)
    weight = pointer(weights, entry, W, ALIGNED)
    anchor = pointer(anchors, entry, A, ALIGNED)
    importance = pointer(importances, entry, F, ALIGNED)
    gradient = pointer(gradients, entry, W, ALIGNED)
    amount = factored(amounts, entry, high, low).to(ACC)
    if SCALED:
        amount *= tl.load(scale).to(ACC)
    at = start + tl.arange(0, BLOCK)
    if start + BLOCK <= size:
        _add_pull(weight, anchor, importance, gradient, amount, at, size, W, ACC, ANCHORED, WEIGHED, False)
    else:
        _add_pull(weight, anchor, importance, gradient, amount, at, size, W, ACC, ANCHORED, WEIGHED, True)


@triton.jit
def _lerp(
    weight, anchor, importance, amount, at, size, W: tl.constexpr, ACC: tl.constexpr,
    ANCHORED: tl.constexpr, WEIGHED: tl.constexpr, EVERY: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    value = read(weight, at, size, ACC, MASKED)
    if WEIGHED:
        share = amount * read(importance, at, size, ACC, MASKED)
        share = tl.where(share > 1, 1.0, share)  # no element goes beyond the anchor; NaN stays
        if EVERY > 1:
            share = kept(share, EVERY)
    else:
        share = amount
    if ANCHORED:
        value = toward(value, read(anchor, at, size, ACC, MASKED), share)
    else:
        value = value * (1 - share)
    write(weight, at, size, value, W, MASKED)


@triton.jit
def lerp(
    entries, starts, sizes, weights, anchors, importances, amounts, skip, high, low,
    W: tl.constexpr, A: tl.constexpr, F: tl.constexpr, ACC: tl.constexpr, ANCHORED: tl.constexpr,
    WEIGHED: tl.constexpr, SKIPPED: tl.constexpr, EVERY: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Move each weight by EVERY shares factor × amount of the way to its anchor; by nothing if the step is skipped."""
    entry, start, size = own_block(entries, starts, sizes)
    weight = pointer(weights, entry, W, ALIGNED)
    anchor = pointer(anchors, entry, A, ALIGNED)
    importance = pointer(importances, entry, F, ALIGNED)
    amount = factored(amounts, entry, high, low)
    if EVERY > 1 and not WEIGHED:
        amount = kept(amount, EVERY)
    amount = unless(skip, amount.to(ACC), SKIPPED)
    at = start + tl.arange(0, BLOCK)
    if start + BLOCK <= size:
        _lerp(weight, anchor, importance, amount, at, size, W, ACC, ANCHORED, WEIGHED, EVERY, False)
    else:
        _lerp(weight, anchor, importance, amount, at, size, W, ACC, ANCHORED, WEIGHED, EVERY, True)


@triton.jit
def _soften(weight, anchor, threshold, at, size, W: tl.constexpr, ACC: tl.constexpr, MASKED: tl.constexpr):
    value = read(weight, at, size, ACC, MASKED)
    start = read(anchor, at, size, ACC, MASKED)
    move = value - start
    nearer = tl.where(move > 0, value - threshold, value + threshold)
    write(weight, at, size, tl.where(tl.abs(move) <= threshold, start, nearer), W, MASKED)  # NaN stays


@triton.jit
def soften(
    entries, starts, sizes, weights, anchors, amounts, skip, high, low,
    W: tl.constexpr, A: tl.constexpr, ACC: tl.constexpr, SKIPPED: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Move each element by its tensor's threshold, factor × amount, toward the anchor and no further."""
    entry, start, size = own_block(entries, starts, sizes)
    weight = pointer(weights, entry, W, ALIGNED)
    anchor = pointer(anchors, entry, A, ALIGNED)
    threshold = unless(skip, factored(amounts, entry, high, low).to(ACC), SKIPPED)
    at = start + tl.arange(0, BLOCK)
    if start + BLOCK <= size:
        _soften(weight, anchor, threshold, at, size, W, ACC, False)
    else:
        _soften(weight, anchor, threshold, at, size, W, ACC, True)
