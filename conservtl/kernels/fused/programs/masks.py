"""Masks drawn by a counter: mixing with the source, and the gradients of mixed weights."""

import triton
import triton.language as tl

from conservtl.kernels.fused.programs._parts import pointer, read, wide, write

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
    value = tl.load(weight + at, mask=at < size, other=0.0) if MASKED else tl.load(weight + at)
    if MASKED:
        tl.store(plain + at, value, mask=at < size)
    else:
        tl.store(plain + at, value)
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
    program = tl.program_id(0)
    entry = tl.load(entries + program)
    start = tl.multiple_of(tl.load(starts + program), 16)
    size = tl.load(sizes + entry)
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
    weight, plain, gradient, word, dropped, at, size, W: tl.constexpr, ACC: tl.constexpr, RESTORED: tl.constexpr,
    MASKED: tl.constexpr, there,
):  # fmt: skip
    if RESTORED:
        if MASKED:
            tl.store(weight + at, tl.load(plain + at, mask=at < size, other=0.0), mask=at < size)
        else:
            tl.store(weight + at, tl.load(plain + at))
    scale = 65536 / (65536 - dropped.to(ACC))
    kept = (word >> 16).to(tl.int32) >= dropped
    if MASKED:
        inside = (at < size) & there
        slope = wide(tl.load(gradient + at, mask=inside, other=0.0), ACC) * tl.where(kept, scale, 0.0)
        tl.store(gradient + at, slope.to(W), mask=inside)
    else:
        slope = read(gradient, at, size, ACC, False) * tl.where(kept, scale, 0.0)
        tl.store(gradient + at, slope.to(W))


@triton.jit(do_not_specialize=["seed", "step", "dropped"])
def unmix(
    entries, starts, sizes, identities, weights, plains, gradients, seed, step, dropped,
    W: tl.constexpr, ACC: tl.constexpr, RESTORED: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Multiply each gradient by the mask M / (1 - p) that ``mix`` drew, and put the plain weights back if RESTORED."""
    program = tl.program_id(0)
    entry = tl.load(entries + program)
    start = tl.multiple_of(tl.load(starts + program), 16)
    size = tl.load(sizes + entry)
    weight = pointer(weights, entry, W, ALIGNED)
    plain = pointer(plains, entry, W, ALIGNED)
    there = tl.load(gradients + entry) != 0
    gradient = pointer(gradients, entry, W, ALIGNED)
    QUARTER: tl.constexpr = BLOCK // 4
    a, b, c, d = _draw(seed, step, tl.load(identities + entry), start, QUARTER)
    at = start + tl.arange(0, QUARTER)
    if (start + BLOCK <= size) & there:
        _unmix(weight, plain, gradient, a, dropped, at, size, W, ACC, RESTORED, False, there)
        _unmix(weight, plain, gradient, b, dropped, at + QUARTER, size, W, ACC, RESTORED, False, there)
        _unmix(weight, plain, gradient, c, dropped, at + 2 * QUARTER, size, W, ACC, RESTORED, False, there)
        _unmix(weight, plain, gradient, d, dropped, at + 3 * QUARTER, size, W, ACC, RESTORED, False, there)
    else:
        _unmix(weight, plain, gradient, a, dropped, at, size, W, ACC, RESTORED, True, there)
        _unmix(weight, plain, gradient, b, dropped, at + QUARTER, size, W, ACC, RESTORED, True, there)
        _unmix(weight, plain, gradient, c, dropped, at + 2 * QUARTER, size, W, ACC, RESTORED, True, there)
        _unmix(weight, plain, gradient, d, dropped, at + 3 * QUARTER, size, W, ACC, RESTORED, True, there)
