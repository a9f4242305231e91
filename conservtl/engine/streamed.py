"""Batches that a loader yields."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from itertools import repeat
from typing import Any

import torch

from conservtl.batches import batch_size as size_of
from conservtl.batches import to_device
from conservtl.engine.batch import Batch, Batches, Order, Waiting, in_steps
from conservtl.engine.buckets import BucketedBatches, StepShare
from conservtl.engine.prefetch import ahead
from conservtl.engine.randomness import preserve_rng

__all__ = ["Bucketed", "Streamed"]


class Streamed(Batches):
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
        super().__init__(device, None if order is None else order.cut)
        self.loader, self._order = loader, order
        self.sized = sized or order is not None

    @property
    def generators(self) -> tuple[torch.Generator, ...]:
        """Random generators of the loader, to be saved in checkpoints."""
        if self._order is not None:
            return super().generators
        batches = getattr(self.loader, "batch_sampler", None)
        owners = (self.loader, getattr(self.loader, "sampler", None), batches, getattr(batches, "sampler", None))
        generators = (getattr(owner, "generator", None) for owner in owners)
        return tuple({id(one): one for one in generators if isinstance(one, torch.Generator)}.values())

    def start_workers(self) -> None:
        """Start workers that stay for all epochs, in a later epoch than the first, in which they drew their seed."""
        if self._order is None and getattr(self.loader, "persistent_workers", False):
            with preserve_rng(self.generators):
                iter(self.loader)

    def count(self) -> int | None:
        """Return the number of batches per epoch, None for an iterable without a length."""
        try:
            return len(self.loader) if isinstance(self.loader, Sized) else None
        except TypeError:  # a DataLoader over an iterable dataset has __len__ but no length
            return None

    def waiting(self, skip: int = 0) -> Iterator[Waiting]:
        """Return the batches of an epoch as functions; the first ``skip`` are loaded and dropped."""
        iterator = iter(self.loader)
        for _ in range(skip):
            next(iterator, None)
        return ahead(enumerate(iterator, skip), self._batch, self.device)

    def _batch(self, numbered: tuple[int, Any]) -> Batch:
        number, content = numbered
        moved = to_device(content, self.device)
        if self._order is None or not self._order.cut.processes.many:
            return Batch(moved, size_of(moved))
        cut, together = self._order.cut, self._order.sizes[number]
        return Batch(moved, cut.part(torch.arange(together))[1], None, together, cut.processes.world)


class Bucketed(Streamed):
    """Batches of sequences of similar length, which may bring their steps.

    Args:
        loader: makes the batches.
        device: device of the batches.
    """

    loader: BucketedBatches

    def __init__(self, loader: BucketedBatches, device: torch.device) -> None:
        super().__init__(loader, device)

    def plain(self) -> Bucketed:
        """Return the same batches of inputs that do not change at random."""
        return Bucketed(self.loader.plain(), self.device)

    def waiting(self, skip: int = 0) -> Iterator[Waiting]:
        """Return the batches of an epoch as functions; the first ``skip`` are not read."""
        return ahead(self.loader.epoch(skip), self._dealt, self.device)

    def steps(self, accumulate: int, skip: int = 0) -> Iterator[list[Waiting]]:
        """Return the batches of each step of an epoch, as functions."""
        dealt = self.loader.epoch(skip)
        return in_steps(ahead(dealt, self._dealt, self.device), dealt.sizes or repeat(accumulate))

    def step_count(self, accumulate: int) -> int | None:
        """Return the number of optimizer steps in an epoch."""
        return self.loader.steps or super().step_count(accumulate)

    def _dealt(self, dealt: tuple[Any, StepShare | None]) -> Batch:
        content, share = to_device(dealt[0], self.device), dealt[1]
        return Batch(content, size_of(content) if share is None or share.examples else 0, of_step=share)
