"""Batches of sequences of similar length, bounded by their total duration with padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch

from conservtl.data.sequences import Sequences

__all__ = ["BucketedBatches", "cut_buckets"]

_RATIO = 1.08  # longest over shortest of a bucket: so much padding at most


class BucketedBatches:
    """Padded batches of sequences of similar length.

    Sequences are sorted into buckets once (``cut_buckets``). Each epoch deals those of a bucket to its batches anew and
    shuffles the batches, by draws from the global generator. The number of batches is the same in each epoch.

    Args:
        data: the sequences.
        most: sequences of a batch at most.
        seconds: duration of a batch at most, its padding included; None: no bound. A longer sequence is a batch alone.
        shuffle: whether to draw a new order each epoch; else batches go from short sequences to long ones.
        part: (rank, number of processes).
    """

    def __init__(
        self, data: Sequences, most: int, seconds: float | None, *, shuffle: bool, part: tuple[int, int] = (0, 1)
    ) -> None:
        self.data, self.shuffle, self.part = data, shuffle, part
        self._buckets = cut_buckets(data.seconds, most, seconds)
        self._count = sum(batches for _, batches in self._buckets)

    def __len__(self) -> int:
        return (self._count + self.part[1] - 1) // self.part[1]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self.data.batch(index) for index in self._epoch())  # drawn now, read later

    def _epoch(self) -> list[list[int]]:
        batches = []
        for places, count in self._buckets:
            dealt = [places[i] for i in torch.randperm(len(places)).tolist()] if self.shuffle else places
            cuts = [len(dealt) * number // count for number in range(count + 1)]
            batches += [dealt[first:last] for first, last in pairwise(cuts)]
        if self.shuffle:
            batches = [batches[i] for i in torch.randperm(len(batches)).tolist()]
        rank, world = self.part
        if world == 1:
            return batches
        shared: list[Any] = [batches]
        torch.distributed.broadcast_object_list(shared, 0)
        batches = shared[0]
        return [batches[i % len(batches)] for i in range(rank, len(self) * world, world)]


def cut_buckets(seconds: Sequence[float], most: int, bound: float | None) -> list[tuple[list[int], int]]:
    """Return buckets of similar durations: the positions in each, and the number of batches it is dealt to.

    A bucket that would not fill one batch is joined to the next longer one.

    Args:
        seconds: durations.
        most: sequences of a batch at most.
        bound: duration of a batch with padding at most; None: none.
    """

    def size(longest: float) -> int:
        return most if bound is None else max(1, min(most, int(bound / max(longest, 1e-9))))

    buckets: list[tuple[list[int], int]] = []
    current: list[int] = []
    for place in sorted(range(len(seconds)), key=lambda place: seconds[place]):
        full = len(current) >= size(seconds[place])
        if current and full and seconds[place] > _RATIO * seconds[current[0]]:
            buckets.append((current, -(-len(current) // size(seconds[current[-1]]))))
            current = []
        current.append(place)
    if current:
        buckets.append((current, -(-len(current) // size(seconds[current[-1]]))))
    return buckets
