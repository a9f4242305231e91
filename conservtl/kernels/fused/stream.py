"""Anchors on the CPU, sent part by part on a stream of their own while programs work on the parts before."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from conservtl.kernels.chunks import Pulled
from conservtl.kernels.dtensor import sharded
from conservtl.kernels.fused.members import BLOCK, Members, fits
from conservtl.kernels.fused.table import Blocks, uploaded

__all__ = ["AnchorStream", "streams"]

_PART = 1 << 22
"""Elements that are sent at once: enough for the full speed of the bus."""
_RING = 4
"""Parts that have memory on the device. The first are sent as soon as the host comes here, which on a GPU is while
the backward pass still runs."""


def streams(item: Pulled) -> bool:
    """Whether a parameter's anchor is streamed: on the CPU, of the parameter's type."""
    anchor, parameter = item.anchor, item.parameter
    if anchor is None or item.importance is not None or sharded(parameter) or anchor.device.type != "cpu":
        return False
    return parameter.device.type == "cuda" and anchor.dtype == parameter.dtype and fits(parameter)


class AnchorStream:
    """Anchors in pinned memory, in the order of the blocks that need them; iterating sends them.

    They are packed once, so that many small tensors are sent by one copy.
    """

    def __init__(self, members: Members, anchors: Sequence[Tensor]) -> None:
        self._device = members.device
        cuda = self._device.type == "cuda"
        lengths = [-(-size // BLOCK) * BLOCK for size in members.sizes]  # each block begins at a multiple of BLOCK
        begins = [0, *accumulate(lengths)]
        self._host = torch.empty(begins[-1], dtype=members.dtype, pin_memory=cuda)
        for begin, size, anchor, weight in zip(begins, members.sizes, anchors, members.weights, strict=False):
            if size:
                self._host[begin : begin + size].as_strided(weight.shape, weight.stride(), begin).copy_(anchor)
        most = min(max(_PART // BLOCK, 1) * BLOCK, begins[-1])
        self._ring = [torch.empty(most, dtype=members.dtype, device=self._device) for _ in range(_RING if most else 0)]
        self._parts: list[tuple[slice, Blocks, Tensor]] = []
        for number, begin in enumerate(range(0, begins[-1], most or 1)):
            held = self._ring[number % _RING]
            place = held.data_ptr() - begin * held.itemsize  # where the first anchor would be
            addresses = [place + one * held.itemsize for one in begins[:-1]]
            blocks = members.blocks.part(slice(begin // BLOCK, (begin + most) // BLOCK))
            self._parts.append((slice(begin, begin + most), blocks, uploaded(addresses, torch.int64, self._device)))
        devices: Any = torch.cuda
        self._side = devices.Stream(self._device) if cuda else None
        self._sent = [devices.Event() for _ in self._ring] if cuda else []
        self._free = [devices.Event() for _ in self._ring] if cuda else []
        if self._side is not None:  # what held the ring's memory before may still be in use
            self._side.wait_stream(devices.current_stream(self._device))

    def __iter__(self) -> Iterator[tuple[Blocks, Tensor]]:
        """Yield blocks with the addresses of their anchors, which have been sent when a program reads them."""
        for number in range(min(_RING, len(self._parts))):
            self._send(number)
        for number, (_, blocks, addresses) in enumerate(self._parts):
            slot = number % _RING
            if self._side is not None:
                torch.cuda.current_stream(self._device).wait_event(self._sent[slot])
            yield blocks, addresses
            if self._side is not None:
                self._free[slot].record(torch.cuda.current_stream(self._device))
            if number + _RING < len(self._parts):
                self._send(number + _RING)

    def _send(self, number: int) -> None:
        """Send a part, once the program that read the one before it in the same memory is done."""
        part, slot = self._host[self._parts[number][0]], number % _RING
        if self._side is not None:
            self._side.wait_event(self._free[slot])
        with nullcontext() if self._side is None else torch.cuda.stream(self._side):
            self._ring[slot][: len(part)].copy_(part, non_blocking=True)
            if self._side is not None:
                self._sent[slot].record(self._side)
