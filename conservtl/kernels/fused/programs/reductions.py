"""Sums over tensors, in two stages, and what follows from them."""

import triton
import triton.language as tl

from conservtl.kernels.fused.programs._parts import TINY, own_block, pointer, read

__all__ = ["decay_shares", "range_sums", "ratios", "sums"]


@triton.jit
def _terms(weight, other, gradient, at, size, given, ACC: tl.constexpr, KIND: tl.constexpr, MASKED: tl.constexpr):
    value = read(weight, at, size, ACC, MASKED)
    if KIND == "weight, gradient":
        slope = read(gradient, at, given, ACC, MASKED)
        return value * value, slope * slope
    start = read(other, at, size, ACC, MASKED)
    move = value - start
    if KIND == "move, start":
        return move * move, start * start
    if KIND == "move, start, absolute":
        return tl.abs(move), tl.abs(start)
    return move * move, move * read(gradient, at, given, ACC, MASKED)


@triton.jit
def sums(
    entries, starts, sizes, weights, anchors, gradients, out, programs,
    W: tl.constexpr, A: tl.constexpr, ACC: tl.constexpr, KIND: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Write two sums over a span of BLOCKS × BLOCK elements; KIND names their terms."""
    program = tl.program_id(0)
    entry, start, size = own_block(entries, starts, sizes)
    weight = pointer(weights, entry, W, ALIGNED)
    anchor = pointer(anchors, entry, A, ALIGNED)
    given = tl.where(tl.load(gradients + entry) != 0, size, 0)  # a parameter may have no gradient
    gradient = pointer(gradients, entry, W, ALIGNED)
    first = tl.zeros([BLOCK], ACC)
    second = tl.zeros([BLOCK], ACC)
    if start + BLOCK * BLOCKS <= given:
        for block in range(BLOCKS):
            at = start + block * BLOCK + tl.arange(0, BLOCK)
            one, two = _terms(weight, anchor, gradient, at, size, given, ACC, KIND, False)
            first += one
            second += two
    else:
        for block in range(BLOCKS):
            at = start + block * BLOCK + tl.arange(0, BLOCK)
            one, two = _terms(weight, anchor, gradient, at, size, given, ACC, KIND, True)
            first += one
            second += two
    tl.store(out + program, tl.sum(first, 0))
    tl.store(out + programs + program, tl.sum(second, 0))


@triton.jit
def range_sums(
    values, order, ends, out, count, total,
    ACC: tl.constexpr, ORDERED: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write a result for each range of values, neighbours in ``order``; a program for each range and vector.

    KIND: sum; largest; roots, of the sums of all vectors; root, of the sums of the first.
    """
    entry = tl.program_id(0)
    vector = tl.program_id(1)
    begin = tl.load(ends + entry)
    end = tl.load(ends + entry + 1)
    result = tl.zeros([BLOCK], ACC)
    wrong = tl.zeros([BLOCK], ACC)
    at = begin
    while at < end:
        places = at + tl.arange(0, BLOCK)
        inside = places < end
        if ORDERED:
            places = tl.load(order + places, mask=inside, other=0)
        value = tl.load(values + vector * total + places, mask=inside, other=0.0)
        if KIND == "largest":
            wrong += tl.where(value == value, 0.0, value)  # NaN, which a maximum would leave out
            result = tl.maximum(result, value)
        else:
            result += value
        at += BLOCK
    answer = tl.max(result, 0) + tl.sum(wrong, 0) if KIND == "largest" else tl.sum(result, 0)
    if KIND == "roots":
        answer = tl.sqrt(answer)
    if KIND == "root":
        answer = tl.where(vector == 0, tl.sqrt(answer), answer)
    tl.store(out + vector * count + entry, answer)


@triton.jit
def decay_shares(
    values, ends, before, products, out, high, low, sign, ACC: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Write the share of the way back of each tensor, by how much its distance has grown if sign × product is positive.

    ``values`` hold parts of the squared distances now, ``before`` the distances before the step.
    """
    entry = tl.program_id(0)
    end = tl.load(ends + entry + 1)
    total = tl.zeros([BLOCK], ACC)
    at = tl.load(ends + entry)
    while at < end:
        places = at + tl.arange(0, BLOCK)
        total += tl.load(values + places, mask=places < end, other=0.0)
        at += BLOCK
    distance = tl.sqrt(tl.sum(total, 0))
    added = distance - tl.load(before + entry)
    added = tl.where(added < 0, 0.0, added) / tl.where(distance < TINY, TINY, distance)
    share = added * high + added * low
    share = tl.where(share > 1, 1.0, share)
    tl.store(out + entry, tl.where(sign * tl.load(products + entry) > 0, share, 0.0))  # NaN is not above zero


@triton.jit
def ratios(
    norms, scale, sums, out, count, ACC: tl.constexpr, SCALED: tl.constexpr, ADDED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Write the ratios of the second vector of norms to the first, and 1: added to ``sums``, unless one is not finite.

    A norm of zero has the ratio -1.
    """
    at = tl.arange(0, BLOCK)
    inside = at < count
    below = tl.load(norms + at, mask=inside, other=1.0)
    above = tl.load(norms + count + at, mask=inside, other=0.0)
    if SCALED:
        above = above / tl.load(scale).to(ACC)
    ratio = tl.where(below > 0, above / tl.where(below < TINY, TINY, below), -1.0)
    finite = tl.sum(tl.where(ratio - ratio == 0, 0, 1), 0) == 0
    ratio = tl.where(finite, ratio, 0.0)
    one = tl.where(finite, 1.0, 0.0).to(ACC)
    if ADDED:
        ratio += tl.load(sums + at, mask=inside, other=0.0)
        one += tl.load(sums + count)
    tl.store(out + at, ratio, mask=inside)
    tl.store(out + count, one)
