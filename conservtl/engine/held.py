"""Batches of tensors that are held on the device, or where there is room for them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from conservtl.batches import take_rows, to_device
from conservtl.engine.batch import Batch, Batches, Cut, Waiting
from conservtl.engine.holding import Holding
from conservtl.engine.prefetch import ahead
from conservtl.errors import DataError

__all__ = ["Held"]


class Held(Batches):
    """Tensors on the device, batched by index.

    Each epoch is shuffled with one ``torch.randperm`` from the global generator, like a loop written by hand; with many
    processes from a generator that serves nothing else, so that the order does not depend on their number. A last batch
    of one example is joined to the batch before: batch norm cannot train on one example.

    Args:
        content: tensors of the same length N, in a tuple or a dictionary.
        batch_size: examples per batch, or batches with parts for each of many processes.
        device: device of the batches, and of the data if it fits.
        shuffle: whether to draw a new order each epoch, if ``batch_size`` is a number.
        holding: decides where the data is held; None: on the device if it fits.
        names: of the examples, for messages.

    Raises:
        DataError: the tensors differ in length, or are empty.
    """

    def __init__(
        self,
        content: tuple[Tensor, ...] | dict[str, Tensor],
        batch_size: int | Cut,
        device: torch.device,
        shuffle: bool = False,
        holding: Holding | None = None,
        names: tuple[str, ...] | None = None,
    ) -> None:
        self.names = names
        tensors = list(content.values()) if isinstance(content, dict) else list(content)
        lengths = [len(tensor) if tensor.ndim else 0 for tensor in tensors]
        if len(set(lengths)) != 1 or 0 in lengths:
            raise DataError(f"data: tensors must have one common length above 0; received lengths {lengths}.")
        self.length = lengths[0]
        self.cut: Cut = batch_size if isinstance(batch_size, Cut) else Cut(batch_size, shuffle)
        super().__init__(device, self.cut)
        self._cuts = self.cut.sizes(self.length)
        self.holding = holding or Holding()
        self._place = self.holding.place(sum(tensor.nbytes for tensor in tensors), device)
        self._names = tuple(content) if isinstance(content, dict) else None
        self._tensors = [tensor.to(self._place) for tensor in tensors]

    def resized(self, batch_size: int) -> Held:
        """Return the same data in batches of another size."""
        other = copy.copy(self)
        other.cut = replace(self.cut, size=batch_size * self.processes.world)
        vars(other)["_cuts"] = other.cut.sizes(self.length)
        return other

    @property
    def content(self) -> Any:
        """All examples, where they are held."""
        return tuple(self._tensors) if self._names is None else dict(zip(self._names, self._tensors, strict=True))

    def count(self) -> int:
        """Return the number of batches per epoch."""
        return len(self._cuts)

    def waiting(self, skip: int = 0) -> Iterator[Waiting]:
        """Return the batches of an epoch as functions, in an order that is drawn now."""
        order = self.cut.order(self.length)
        parts = torch.split(order, self._cuts)[skip:]
        if self._place.type == self.device.type:
            placed = torch.split(order.to(self._place), self._cuts)[skip:]
            return map(partial, repeat(self._batch), parts, placed)
        read = ((index, self._rows(self.cut.part(index)[0], pinned=True)) for index in parts)
        return ahead(read, self._moved, self.device)

    def take(self, index: Tensor) -> Any:
        """Return the examples at these positions, on the device."""
        rows = self._rows(index)
        return rows if self._place == self.device else to_device(rows, self.device)

    def _rows(self, index: Tensor, *, pinned: bool = False) -> Any:
        """Return the examples at these positions where they are held, in pinned memory if they are to be copied."""
        index = index.to(self._place)
        rows = [take_rows(tensor, index) for tensor in self._tensors]
        if pinned and torch.cuda.is_available():
            rows = [row.pin_memory() for row in rows]
        return tuple(rows) if self._names is None else dict(zip(self._names, rows, strict=True))

    def _batch(self, index: Tensor, placed: Tensor) -> Batch:
        if not self.processes.many:
            return Batch(self.take(placed), len(index), index)
        return self._parted(index, self.take(self.cut.part(placed)[0]))

    def _moved(self, batch: tuple[Tensor, Any]) -> Batch:
        index, content = batch
        return self._parted(index, to_device(content, self.device))

    def _parted(self, index: Tensor, content: Any) -> Batch:
        """Return this process's part of a batch, given the positions of all parts."""
        rows, size = self.cut.part(index)
        if not self.processes.many:
            return Batch(content, size, rows)
        return Batch(content, size, rows, len(index), self.processes.world)
