"""Shares of the way to the source, and those of many steps at once."""

from __future__ import annotations

from typing import Any

__all__ = ["kept"]


def kept(share: Any, every: int) -> Any:
    r"""Return the share of ``every`` steps in one, :math:`1 - (1 - s)^k`.

    By squaring, s_2k = s_k (2 - s_k) and s_(a + b) = s_a + s_b - s_a s_b, so that small shares lose no digits.
    """
    result, power = None, share
    while every:
        if every % 2:
            result = power if result is None else result + power - result * power
        every //= 2
        power = power * (2 - power) if every else power
    return result
