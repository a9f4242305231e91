"""Masks drawn by a counter: mixing with the source, and the gradients of mixed weights."""

import triton
import triton.language as tl

from conservtl.kernels.fused.programs._parts import load, own_block, pointer, read, wide, write

__all__ = ["mix", "unmix"]


@triton.jit
def _draw(seed, step, identity, start, QUARTER: tl.constexpr):
    # Element start + q QUARTER + i of a tensor takes the q-th word of the i-th counter of its block.
    counter = start // 4 + tl.arange(0, QUARTER)
    low = (counter & 0xFFFFFFFF).to(tl.uint32)
    high = (counter >> 32).to(tl.uint32)
    zero = low * 0
    return tl.philox(seed, low, high, zero + identity.to(tl.uint32), zero + step.to(tl.uint32))


@triton.jit
def _mix(
    weight, anchor, plain, word, dropped, at, size, W: tl.constexpr, ACC: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    value = load(weight, at, size, MASKED)
    write(plain, at, size, value, W, MASKED)
    start = read(anchor, at, size, ACC, MASKED)
    scale = 65536 / (65536 - dropped.to(ACC))
    mixed = start + (wide(value, ACC) - start) * scale
    kept = (word >> 16).to(tl.int32) >= dropped
    write(weight, at, size, tl.where(kept, mixed, start), W, MASKED)


@triton.jit(do_not_specialize=["seed", "step", "dropped"])
def mix(
    entries, starts, sizes, identities, weights, anchors, plains, seed, step, dropped,
    W: tl.constexpr, A: tl.constexpr, ACC: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Keep a copy of each weight, and put anchor + M (weight - anchor) / (1 - p) in its place."""
    entry, start, size = own_block(entries, starts, sizes)
    weight = pointer(weights, entry, W, ALIGNED)
    anchor = pointer(anchors, entry, A, ALIGNED)
    plain = pointer(plains, entry, W, ALIGNED)
    QUARTER: tl.constexpr = BLOCK // 4
    a, b, c, d = _draw(seed, step, tl.load(identities + entry), start, QUARTER)
    at = start + tl.arange(0, QUARTER)
    if start + BLOCK <= size:
        _mix(weight, anchor, plain, a, dropped, at, size, W, ACC, False)
        _mix(weight, anchor, plain, b, dropped, at + QUARTER, size, W, ACC, False)
        _mix(weight, anchor, plain, c, dropped, at + 2 * QUARTER, size, W, ACC, False)
        _mix(weight, anchor, plain, d, dropped, at + 3 * QUARTER, size, W, ACC, False)
    else:
        _mix(weight, anchor, plain, a, dropped, at, size, W, ACC, True)
        _mix(weight, anchor, plain, b, dropped, at + QUARTER, size, W, ACC, True)
        _mix(weight, anchor, plain, c, dropped, at + 2 * QUARTER, size, W, ACC, True)
        _mix(weight, anchor, plain, d, dropped, at + 3 * QUARTER, size, W, ACC, True)


@triton.jit
def _unmix(
    weight, plain, gradient, word, dropped, at, size, given, W: tl.constexpr, ACC: tl.constexpr,
    RESTORED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    if RESTORED:
        write(weight, at, size, load(plain, at, size, MASKED), W, MASKED)
    scale = 65536 / (65536 - dropped.to(ACC))
    kept = (word >> 16).to(tl.int32) >= dropped
    slope = read(gradient, at, given, ACC, MASKED) * tl.where(kept, scale, 0.0)
    write(gradient, at, given, slope, W, MASKED)


@triton.jit(do_not_specialize=["seed", "step", "dropped"])
def unmix(
    entries, starts, sizes, identities, weights, plains, gradients, seed, step, dropped,
    W: tl.constexpr, ACC: tl.constexpr, RESTORED: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Multiply each gradient by the mask M / (1 - p) that ``mix`` drew, and put the plain weights back if RESTORED."""
    entry, start, size = own_block(entries, starts, sizes)
    weight = pointer(weights, entry, W, ALIGNED)
    plain = pointer(plains, entry, W, ALIGNED)
    given = tl.where(tl.load(gradients + entry) != 0, size, 0)  # a parameter may have no gradient
    gradient = pointer(gradients, entry, W, ALIGNED)
    QUARTER: tl.constexpr = BLOCK // 4
    a, b, c, d = _draw(seed, step, tl.load(identities + entry), start, QUARTER)
    at = start + tl.arange(0, QUARTER)
    if start + BLOCK <= given:
        _unmix(weight, plain, gradient, a, dropped, at, size, given, W, ACC, RESTORED, False)
        _unmix(weight, plain, gradient, b, dropped, at + QUARTER, size, given, W, ACC, RESTORED, False)
        _unmix(weight, plain, gradient, c, dropped, at + 2 * QUARTER, size, given, W, ACC, RESTORED, False)
        _unmix(weight, plain, gradient, d, dropped, at + 3 * QUARTER, size, given, W, ACC, RESTORED, False)
    else:
        _unmix(weight, plain, gradient, a, dropped, at, size, given, W, ACC, RESTORED, True)
        _unmix(weight, plain, gradient, b, dropped, at + QUARTER, size, given, W, ACC, RESTORED, True)
        _unmix(weight, plain, gradient, c, dropped, at + 2 * QUARTER, size, given, W, ACC, RESTORED, True)
        _unmix(weight, plain, gradient, d, dropped, at + 3 * QUARTER, size, given, W, ACC, RESTORED, True)
