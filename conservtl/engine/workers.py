"""Examples of a dataset, loaded by processes of their own: the same batches whatever their number."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from conservtl.engine.batch import Order
from conservtl.engine.randomness import preserve_rng, seed_all

__all__ = ["number_of_workers", "worker_loader"]

_MOST = 8  # workers that are started unless the settings say otherwise


def number_of_workers(setting: int | str, device: torch.device) -> int | None:
    """Return the number of processes to load with; None: the examples are loaded as in a loop written by hand."""
    if isinstance(setting, int):
        return setting
    # Where processes are started anew, a dataset must be picklable, which nobody asked for.
    if device.type != "cuda" or multiprocessing.get_start_method() != "fork":
        return None
    return min(_MOST, os.cpu_count() or 1)


def worker_loader(dataset: Dataset[Any], order: Order, workers: int, *, pinned: bool) -> DataLoader[Any]:
    """Return a DataLoader of a dataset's examples in an order that is drawn by another.

    Random numbers that an example draws come from a seed of the epoch and its position, so neither batches nor the
    generators of training depend on the number of processes.

    Args:
        dataset: of examples by position.
        order: yields the positions of each batch; its generator gives the seeds of epochs too.
        workers: number of processes; 0: this one loads.
        pinned: whether batches are put into pinned memory.
    """
    return DataLoader(
        _Seeded(dataset),
        batch_sampler=_Tagged(order),
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=pinned,
        generator=torch.Generator(),  # the loader's own draws: with workers that stay they happen once
    )


class _Tagged:
    """Batch sampler of positions with the seed of their epoch."""

    def __init__(self, order: Order) -> None:
        self._order = order

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        # Drawn with the first batch, because a DataLoader with workers asks twice for its first iterator.
        seed = int(torch.empty((), dtype=torch.int64).random_(generator=self._order.cut.generator))
        for batch in self._order:
            yield [(seed, position) for position in batch]


class _Seeded(Dataset[Any]):
    """Dataset whose examples draw from a seed of their own."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self._dataset = dataset

    def __getitem__(self, tagged: tuple[int, int]) -> Any:
        seed, position = tagged
        with nullcontext() if get_worker_info() is not None else preserve_rng():
            seed_all((seed + position * 0x9E3779B97F4A7C15) % 2**62)
            many = getattr(self._dataset, "__getitems__", None)
            return self._dataset[position] if many is None else many([position])[0]
