"""Reading and writing of blocks, shared by all programs."""

import triton
import triton.language as tl

__all__ = ["TINY", "factored", "kept", "load", "own_block", "pointer", "read", "toward", "unless", "wide", "write"]


TINY = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def own_block(entries, starts, sizes):
    # The tensor of this program, the first element of its block, and the tensor's size.
    program = tl.program_id(0)
    entry = tl.load(entries + program)
    return entry, tl.multiple_of(tl.load(starts + program), 16), tl.load(sizes + entry)


@triton.jit
def pointer(column, entry, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(column + entry).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def wide(value, ACC: tl.constexpr):
    if value.dtype.primitive_bitwidth < 32:
        value = value.to(tl.float32)
    return value.to(ACC)


@triton.jit
def load(pointer, at, size, MASKED: tl.constexpr):
    return tl.load(pointer + at, mask=at < size, other=0.0) if MASKED else tl.load(pointer + at)


@triton.jit
def read(pointer, at, size, ACC: tl.constexpr, MASKED: tl.constexpr):
    return wide(load(pointer, at, size, MASKED), ACC)


@triton.jit
def write(pointer, at, size, value, DTYPE: tl.constexpr, MASKED: tl.constexpr):
    if MASKED:
        tl.store(pointer + at, value.to(DTYPE), mask=at < size)
    else:
        tl.store(pointer + at, value.to(DTYPE))


@triton.jit
def toward(weight, anchor, share):
    # As torch.lerp: exactly the weight at a share of 0, exactly the anchor at 1.
    return tl.where(share < 0.5, weight + share * (anchor - weight), anchor - (anchor - weight) * (1 - share))


@triton.jit
def kept(share, K: tl.constexpr):
    # 1 - (1 - share)^K by squaring; as shares, so that small ones lose no digits.
    result = share * 0
    power = share
    for bit in tl.static_range(0, 31):
        if (K >> bit) > 0:
            if (K >> bit) % 2 == 1:
                result = result + power - result * power
            power = power * (2 - power)
    return result


@triton.jit
def factored(amounts, entry, high, low):
    # A number of the host arrives in float32: in two parts it keeps 48 bits.
    amount = tl.load(amounts + entry).to(tl.float64)
    return amount * high + amount * low


@triton.jit
def unless(skip, amount, SKIPPED: tl.constexpr):
    # A skipped step moves nothing.
    return tl.where(tl.load(skip) == 0, amount, 0.0) if SKIPPED else amount
