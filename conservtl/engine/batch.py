"""A batch on the device, the cut of a set into batches, and the batches whose gradients make one step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, repeat
from typing import Any

import torch
from torch import Tensor

from conservtl.engine.buckets import StepShare
from conservtl.engine.processes import ALONE, Processes

__all__ = ["Batch", "Batches", "Cut", "Order", "Waiting", "examples_of", "in_steps"]


@dataclass(frozen=True)
class Batch:
    """One batch on the device.

    Args:
        content: the batch as ``forward`` and ``loss`` take it, such as a tuple or a dictionary of tensors.
        size: number of examples that count; 0 for a stand-in, where a batch has fewer examples than processes.
        index: (size,), positions of the examples in held data, which the host knows; None for streamed data.
        together: number of examples of all processes' parts, for their mean; None: the part is not known.
        processes: number of processes that share the batch.
        of_step: its share in its optimizer step, where that is not one of equal batches; None: it is.
    """

    content: Any
    size: int
    index: Tensor | None = None
    together: int | None = None
    processes: int = 1
    of_step: StepShare | None = None

    @property
    def share(self) -> float:
        """Factor on the mean over this part, so that the mean over processes is that over all examples."""
        return 1.0 if self.together is None else self.size * self.processes / self.together

    @property
    def weight(self) -> float:
        """Number of examples that a loss with this factor stands for, in sums over processes."""
        return self.size if self.together is None else self.together / self.processes


Waiting = Callable[[], Batch]


class Batches(ABC):
    """Batches of a set, epoch by epoch.

    Args:
        device: device of the batches.
        cut: batches and parts; None for batches that were not made here.
    """

    sized = True
    """Whether the batches have the size of the settings."""
    names: Sequence[str] | None = None
    """Of the examples, for messages."""

    def __init__(self, device: torch.device, cut: Cut | None) -> None:
        self.device, self.cut = device, cut

    @property
    def generators(self) -> tuple[torch.Generator, ...]:
        """Generators beside the global ones that orders are drawn from, to be saved in checkpoints."""
        return () if self.cut is None or self.cut.generator is None else (self.cut.generator,)

    @property
    def processes(self) -> Processes:
        """The processes that share each batch; this one alone for batches that were not made here."""
        return ALONE if self.cut is None else self.cut.processes

    @abstractmethod
    def count(self) -> int | None:
        """Return the number of batches per epoch, None for an iterable without a length."""

    @abstractmethod
    def waiting(self, skip: int = 0) -> Iterator[Waiting]:
        """Return the batches of an epoch but the first ``skip``, as functions that put them on the device.

        Their order is drawn when this is called.
        """

    def epoch(self, skip: int = 0) -> Iterator[Batch]:
        """Return the same batches on the device."""
        return (make() for make in self.waiting(skip))

    def steps(self, accumulate: int, skip: int = 0) -> Iterator[list[Waiting]]:
        """Return the batches of each step of an epoch, as functions."""
        return in_steps(self.waiting(skip), repeat(accumulate))

    def step_count(self, accumulate: int) -> int | None:
        """Return the number of optimizer steps in an epoch, None for an iterable without a length."""
        count = self.count()
        return None if count is None else -(-count // accumulate)

    def plain(self) -> Batches:
        """Return the same batches of inputs that do not change at random."""
        return self


def examples_of(batch: Batch, form: str) -> str:
    """Return the positions of a batch's examples in this form, for a message; empty for streamed data."""
    if batch.index is None:
        return ""
    first = ", ".join(str(position) for position in batch.index[:8].tolist())
    return form.format(f"{first}{', …' if batch.size > 8 else ''}")


def in_steps(batches: Iterator[Waiting], sizes: Iterable[int]) -> Iterator[list[Waiting]]:
    """Yield the batches of each step.

    The last step may have fewer, and data may have no length, so each is read ahead before its first batch is put on
    the device: the mean needs its size.
    """
    for size in sizes:
        if not (step := list(islice(batches, size))):
            return
        yield step


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
