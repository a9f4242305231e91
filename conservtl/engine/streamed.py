"""Batches that a loader yields."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from itertools import repeat
from typing import Any

import torch

from conservtl.batches import batch_size as size_of
from conservtl.batches import to_device
from conservtl.engine.batch import Batch, Waiting, in_steps
from conservtl.engine.buckets import BucketedBatches, StepShare
from conservtl.engine.cuts import Cut, Order
from conservtl.engine.prefetch import ahead
from conservtl.engine.processes import ALONE, Processes
from conservtl.engine.randomness import preserve_rng

__all__ = ["Streamed"]


class Streamed:
    """Batches from a DataLoader or another iterable that can be iterated repeatedly.

    Args:
        loader: yields the batches.
        device: device of the batches.
        order: its batch sampler, if it was made here; knows which part of each batch is this process's.
        sized: whether the batches have the size of the settings.
    """

    def __init__(
        self, loader: Iterable[Any], device: torch.device, order: Order | None = None, *, sized: bool = False
    ) -> None:
        self.loader = loader
        self.device = device
        self._order = order
        self.sized = sized or order is not None

    @property
    def generators(self) -> tuple[torch.Generator, ...]:
        """Random generators of the loader, to be saved in checkpoints."""
        if self._order is not None:
            return self._order.cut.generators
        batches = getattr(self.loader, "batch_sampler", None)
        owners = (self.loader, getattr(self.loader, "sampler", None), batches, getattr(batches, "sampler", None))
        generators = (getattr(owner, "generator", None) for owner in owners)
        return tuple({id(one): one for one in generators if isinstance(one, torch.Generator)}.values())

    @property
    def processes(self) -> Processes:
        """The processes that share each batch; this one alone for batches that were not made here."""
        return ALONE if self.cut is None else self.cut.processes

    @property
    def cut(self) -> Cut | None:
        """Batches and parts; None for batches that were not made here."""
        return None if self._order is None else self._order.cut

    def plain(self) -> Streamed:
        """Return the same batches of inputs that do not change at random, where these were made here."""
        return Streamed(self.loader.plain(), self.device) if isinstance(self.loader, BucketedBatches) else self

    def start_workers(self) -> None:
        """Start workers that stay for all epochs, in a later epoch than the first, in which they drew their seed."""
        if getattr(self.loader, "persistent_workers", False):
            with preserve_rng(self.generators):
                iter(self.loader)

    def count(self) -> int | None:
        """Return the number of batches per epoch, None for an iterable without a length."""
        if not isinstance(self.loader, Sized):
            return None
        try:
            return len(self.loader)
        except TypeError:  # a DataLoader over an iterable dataset has __len__ but no length
            return None

    def epoch(self, skip: int = 0) -> Iterator[Batch]:
        """Return the batches of an epoch but the first ``skip``, which are loaded and dropped."""
        return (make() for make in self.waiting(skip))

    def step_count(self, accumulate: int) -> int | None:
        """Return the number of optimizer steps in an epoch, None for an iterable without a length."""
        made = self.loader.steps if isinstance(self.loader, BucketedBatches) else None
        count = self.count()
        return made if made is not None or count is None else -(-count // accumulate)

    def steps(self, accumulate: int, skip: int = 0) -> Iterator[list[Waiting]]:
        """Return the batches of each step of an epoch, as functions; data of different lengths may bring its steps."""
        if isinstance(self.loader, BucketedBatches):
            dealt = self.loader.epoch(skip)
            return in_steps(ahead(dealt, self._dealt, self.device), dealt.sizes or repeat(accumulate))
        return in_steps(self.waiting(skip), repeat(accumulate))

    def waiting(self, skip: int = 0) -> Iterator[Waiting]:
        """Return the same batches as functions that put them on the device."""
        if isinstance(self.loader, BucketedBatches):
            return ahead(self.loader.epoch(skip), self._dealt, self.device)
        iterator = iter(self.loader)
        for _ in range(skip):
            next(iterator, None)
        return ahead(enumerate(iterator, skip), self._batch, self.device)

    def _dealt(self, dealt: tuple[Any, StepShare | None]) -> Batch:
        content, share = to_device(dealt[0], self.device), dealt[1]
        return Batch(content, size_of(content) if share is None or share.examples else 0, of_step=share)

    def _batch(self, numbered: tuple[int, Any]) -> Batch:
        number, content = numbered
        moved = to_device(content, self.device)
        if self._order is None or not self._order.cut.processes.many:
            return Batch(moved, size_of(moved))
        cut, together = self._order.cut, self._order.sizes[number]
        return Batch(moved, cut.part(torch.arange(together))[1], None, together, cut.processes.world)
