"""Tables on the device that a program reads: addresses and numbers of many tensors, and the blocks that cover them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from conservtl.kernels.backend import capturing

__all__ = ["Addresses", "Blocks", "keep", "uploaded"]

_captured: list[Any] = []
"""Tables, here and on the host, that CUDA graphs of the caller's read at each replay."""


class Blocks:
    """Division of rows of numbers into blocks, one for each program.

    Args:
        sizes: number of elements (or rows) of each tensor.
        block: elements of a block; or a block for each tensor.
        device: of the tables.
    """

    def __init__(self, sizes: Sequence[int], block: int | Sequence[int], device: torch.device) -> None:
        blocks = [block] * len(sizes) if isinstance(block, int) else list(block)
        counts = [-(-size // most) for size, most in zip(sizes, blocks, strict=True)]
        entries = [entry for entry, count in enumerate(counts) for _ in range(count)]
        starts = [number * most for count, most in zip(counts, blocks, strict=True) for number in range(count)]
        self.count = len(entries)
        self.counts = counts
        """Number of blocks of each row."""
        self.entries = uploaded(entries, torch.int32, device)
        self.starts = uploaded(starts, torch.int64, device)
        self.sizes = uploaded(sizes, torch.int64, device)
        self.ends = uploaded([0, *accumulate(counts)], torch.int32, device)

    def part(self, of: slice) -> Blocks:
        """Return some of the blocks."""
        part = copy(self)
        part.entries, part.starts = self.entries[of], self.starts[of]
        part.count = len(part.entries)
        return part


class Addresses:
    """Addresses of tensors, sent to the device again only if they have changed."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._values: list[int] | None = None
        self._sent: Tensor | None = None
        self.aligned = True
        """Whether words of 16 bytes can be read at each of the addresses that were sent last."""

    def to(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the tensors' addresses on the device."""
        return self.at(list(map(_address, tensors)))

    def at(self, addresses: list[int]) -> Tensor:
        """Return addresses on the device; 0 means no tensor."""
        captured = capturing()
        if captured or self._sent is None or addresses != self._values:
            self.aligned = not any(address % 16 for address in addresses)
            self._sent = uploaded(addresses, torch.int64, self._device)
            self._values = None if captured else addresses  # a graph sends them when it is replayed, and not before
        return self._sent


def keep(tables: Any) -> None:
    """Keep tables for as long as the process lives if a CUDA graph is captured, whose end is not known."""
    if capturing():
        _captured.append(tables)


def uploaded(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return numbers on a device, without a wait."""
    host = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
    keep(host)
    return host.to(device, non_blocking=True)


_address: Callable[[Tensor], int] = torch.Tensor.data_ptr
