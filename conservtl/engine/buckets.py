"""Batches of sequences of similar length, bounded by their total duration with padding."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch

from conservtl.data.sequences import Sequences
from conservtl.functions import IGNORED

__all__ = ["BucketedBatches", "DealtBatches", "StepShare", "cut_buckets"]

_RATIO = 1.08  # longest over shortest of a bucket: so much padding at most
_ROUNDING = 1e-6  # seconds


@dataclass(frozen=True)
class StepShare:
    """Share of a batch in its optimizer step, times the number of processes, whose gradients are averaged.

    Args:
        examples: by examples; 0 for a stand-in.
        labels: by labels, for a loss that is a mean over these.
    """

    examples: float
    labels: float


class BucketedBatches:
    """Padded batches of sequences of similar length.

    Sequences are sorted into buckets once (``cut_buckets``). Each epoch deals those of a bucket to its batches anew and
    shuffles the batches, by draws from the global generator. The number of batches is the same in each epoch.

    With ``step``, batches are packed into steps once, by their longest possible durations; each epoch then shuffles the
    steps, so that their number is the same in each epoch too.

    Args:
        data: the sequences.
        most: sequences of a batch at most.
        seconds: duration of a batch at most, its padding included; None: no bound. A longer sequence is a batch alone.
        shuffle: whether to draw a new order each epoch; else batches go from short sequences to long ones.
        part: (rank, number of processes).
        step: duration of all batches of an optimizer step at most, those of other processes included; None: steps are
            not made here.
    """

    def __init__(
        self,
        data: Sequences,
        most: int,
        seconds: float | None,
        *,
        shuffle: bool,
        part: tuple[int, int] = (0, 1),
        step: float | None = None,
    ) -> None:
        self.data, self.shuffle, self.part, self.step = data, shuffle, part, step
        bound = step if seconds is None else seconds
        self._varies = shuffle and data.durations is not None
        longest = data.durations[1] if self._varies and data.durations else 1.0
        lengths = [one * longest for one in data.seconds]
        self._buckets = cut_buckets(lengths, most, bound)
        self._cuts: list[tuple[int, int, int]] = []  # bucket, first and last place of each batch
        durations = []
        for number, (places, count) in enumerate(self._buckets):
            ends = [len(places) * cut // count for cut in range(count + 1)]
            self._cuts += [(number, first, last) for first, last in pairwise(ends)]
            most_seconds = lengths[places[-1]]
            durations += [(last - first) * most_seconds for first, last in pairwise(ends)]
        self._steps = [[number] for number in range(len(durations))] if step is None else _packed(durations, step)

    def __len__(self) -> int:
        return sum(self._rounds(group) for group in self._steps) if self.step else self._rounds(self._steps)

    @property
    def steps(self) -> int | None:
        """Number of optimizer steps in an epoch; None if they are not made here."""
        return None if self.step is None else len(self._steps)

    def largest(self) -> list[list[int]]:
        """Return the positions of the batches that take most memory: of the longest, of the most, of the most seconds.

        Which sequences of a bucket come together changes from epoch to epoch; these are the longest.
        """
        whole = [places[len(places) * (count - 1) // count :] for places, count in self._buckets]
        seconds = self.data.seconds
        chosen = (whole[-1], max(whole, key=len), max(whole, key=lambda places: len(places) * seconds[places[-1]]))
        return list({places[-1]: places for places in chosen}.values())

    def plain(self) -> BucketedBatches:
        """Return the same batches of inputs that do not change."""
        other = copy.copy(self)
        vars(other)["_varies"] = False
        return other

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (content for content, _ in self.epoch())

    def epoch(self, skip: int = 0) -> DealtBatches:
        """Return the batches of an epoch but the first ``skip``: drawn now, read later."""
        rank, world = self.part
        steps, draw = self._dealt()
        if self.step is None:
            batches = [batch for (batch,) in steps]
            own = [batches[i % len(batches)] for i in range(rank, len(self) * world, world)]
            return DealtBatches(self.data, own[skip:], draw)
        dealt: list[list[int]] = []
        shares: list[StepShare] = []
        for step in steps:
            mine = step[rank::world]
            stand_ins = [step[0]] * (self._rounds(step) - len(mine))
            dealt += mine + stand_ins
            every = [place for batch in step for place in batch]
            shares += [self._share(batch, every) for batch in mine] + [StepShare(0.0, 0.0) for _ in stand_ins]
        ends = accumulate(self._rounds(step) for step in steps)
        sizes = [min(self._rounds(step), end - skip) for step, end in zip(steps, ends, strict=True) if end > skip]
        return DealtBatches(self.data, dealt[skip:], draw, shares[skip:], sizes)

    def _share(self, batch: list[int], step: list[int]) -> StepShare:
        world = self.part[1]

        def labels(places: list[int]) -> int:
            return sum(int((self.data.labels[place] != IGNORED).sum()) for place in places)

        return StepShare(len(batch) * world / len(step), labels(batch) * world / max(1, labels(step)))

    def _rounds(self, batches: Sequence[Any]) -> int:
        """Return the number of batches that each process gets of these."""
        return -(-len(batches) // self.part[1])

    def _dealt(self) -> tuple[list[list[list[int]]], int | None]:
        """Return the batches of each step of an epoch and the seed of its inputs, the same in all processes."""
        orders = [
            [places[i] for i in torch.randperm(len(places)).tolist()] if self.shuffle else places
            for places, _ in self._buckets
        ]
        batches = [orders[bucket][first:last] for bucket, first, last in self._cuts]
        steps = [[batches[number] for number in group] for group in self._steps]
        if self.shuffle:
            steps = [steps[i] for i in torch.randperm(len(steps)).tolist()]
        draw = int(torch.randint(2**62, ())) if self._varies else None
        if self.part[1] == 1:
            return steps, draw
        shared: list[Any] = [steps, draw]
        torch.distributed.broadcast_object_list(shared, 0)
        return shared[0], shared[1]


class DealtBatches(Iterator[tuple[dict[str, Any], StepShare | None]]):
    """A process's batches of one epoch, read one by one, with the share of each in its step.

    Args:
        data: the sequences.
        batches: positions of each batch.
        draw: seed of changes of the inputs; None: they do not change.
        shares: of each batch; None: steps are not made here.
        sizes: batches of each step; None likewise.
    """

    def __init__(
        self,
        data: Sequences,
        batches: Sequence[list[int]],
        draw: int | None = None,
        shares: Sequence[StepShare] | None = None,
        sizes: Sequence[int] | None = None,
    ) -> None:
        self.sizes = sizes
        self._data, self._draw = data, draw
        self._left = iter(zip(batches, [None] * len(batches) if shares is None else shares, strict=True))

    def __next__(self) -> tuple[dict[str, Any], StepShare | None]:
        places, share = next(self._left)
        return self._data.batch(places, self._draw), share


def _packed(durations: Sequence[float], most: float) -> list[list[int]]:
    """Return batches in groups of at most a duration, one that is longer alone; lengths are mixed in each group."""
    groups: list[list[int]] = []
    total = most
    for number in torch.randperm(len(durations), generator=torch.Generator().manual_seed(0)).tolist():
        if total + durations[number] > most + _ROUNDING:
            groups.append([])
            total = 0.0
        groups[-1].append(number)
        total += durations[number]
    return groups


def cut_buckets(seconds: Sequence[float], most: int, bound: float | None) -> list[tuple[list[int], int]]:
    """Return buckets of similar durations: the positions in each, and the number of batches it is dealt to.

    A bucket that would not fill one batch is joined to the next longer one.
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
