"""Reading and writing of blocks, shared by all programs."""

import triton
import triton.language as tl

__all__ = ["TINY", "factored", "kept", "pointer", "read", "toward", "wide", "write"]


TINY = tl.constexpr(1.1754943508222875e-38)


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
def read(pointer, at, size, ACC: tl.constexpr, MASKED: tl.constexpr):
    value = tl.load(pointer + at, mask=at < size, other=0.0) if MASKED else tl.load(pointer + at)
    return wide(value, ACC)


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
