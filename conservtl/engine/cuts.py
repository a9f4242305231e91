"""Cuts of a set of examples into batches: their order, and the part of each that is a process's own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from conservtl.engine.processes import ALONE, Processes

__all__ = ["Cut", "Order"]


@dataclass(frozen=True)
class Cut:
    """Batches of a set of examples, and the part of each that is this process's.

    Args:
        size: examples per batch of all processes together.
        shuffle: whether to draw a new order each epoch.
        processes: that share each batch.
        generator: gives the orders; None: torch's global generator.
        least: examples that a last batch must have, or it is joined to the batch before.
    """

    size: int
    shuffle: bool
    processes: Processes = ALONE
    generator: torch.Generator | None = None
    least: int = 2

    @property
    def generators(self) -> tuple[torch.Generator, ...]:
        """The generator of its own, if there is one."""
        return () if self.generator is None else (self.generator,)

    def sizes(self, length: int) -> list[int]:
        """Return the examples per batch."""
        sizes = [self.size] * (length // self.size) + ([length % self.size] if length % self.size else [])
        if len(sizes) > 1 and sizes[-1] < min(self.least, self.size):
            sizes[-2:] = [sizes[-2] + sizes[-1]]
        return sizes

    def order(self, length: int) -> Tensor:
        """Return the positions in the order of an epoch, the same in all processes."""
        return torch.randperm(length, generator=self.generator) if self.shuffle else torch.arange(length)

    def part(self, index: Tensor) -> tuple[Tensor, int]:
        """Return this process's part of a batch, and its size.

        A batch with fewer examples than processes has none for some of them: these get its first as a stand-in that
        does not count, because all processes must run the model.
        """
        rank, world = self.processes.rank, self.processes.world
        rows = index[rank::world]
        return (rows, len(rows)) if len(rows) else (index[:1], 0)


class Order:
    """Batch sampler with the same batches, order and parts as ``Held``."""

    def __init__(self, length: int, cut: Cut) -> None:
        self.length, self.cut = length, cut
        self.sizes = cut.sizes(length)

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[list[int]]:
        for index in torch.split(self.cut.order(self.length), self.sizes):
            yield (self.cut.part(index)[0] if self.cut.processes.many else index).tolist()
