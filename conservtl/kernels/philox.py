"""Random words by a counter: each is a function of a seed, a step, a tensor and a place in it, on every device."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

__all__ = ["DRAWN", "identity", "words"]

DRAWN = 2048
"""Elements that share 512 counters: element 512 q + i of such a block takes word q of counter i. Masks depend on it."""
_KEYS = 0x9E3779B9, 0xBB67AE85
_FACTORS = 0xD2511F53, 0xCD9E8D57
_WORD = 0xFFFFFFFF


def identity(name: str) -> int:
    """Return the number by which a parameter's words are drawn, the same in every process and version."""
    return zlib.crc32(name.encode())


def words(count: int, seed: int, step: int, tensor: int, device: torch.device | None = None) -> Tensor:
    """Return random numbers of 32 bits, (count,), int64: those that Triton's programs draw for an ``identity``.

    Reference:
        Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3" (Philox4x32-10).
    """
    blocks = -(-count // DRAWN)
    counter = torch.arange(blocks * DRAWN // 4, device=device)
    zero = torch.zeros_like(counter)
    a, b, c, d = counter & _WORD, counter >> 32, zero + tensor, zero + step
    first, second = seed & _WORD, seed >> 32
    for _ in range(10):
        high_a, low_a = _product(_FACTORS[0], a)
        high_c, low_c = _product(_FACTORS[1], c)
        a, b, c, d = high_c ^ b ^ first, low_c, high_a ^ d ^ second, low_a
        first, second = (first + _KEYS[0]) & _WORD, (second + _KEYS[1]) & _WORD
    drawn = torch.stack([a, b, c, d]).view(4, blocks, DRAWN // 4).transpose(0, 1)
    return drawn.reshape(-1)[:count]


def _product(factor: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """Return the upper and the lower 32 bits of a product of 32-bit words, which int64 cannot hold."""
    low, high = factor * (word & 0xFFFF), factor * (word >> 16)
    middle = high + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)
