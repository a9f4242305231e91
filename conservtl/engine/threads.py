"""The number of CPU threads, chosen by timing the first steps."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

import torch

__all__ = ["ThreadTimer", "cpu_threads"]

_WARM = 2  # steps of a phase that are not timed: memory is allocated, kernels are chosen
_TIMED = 5  # steps timed with one thread, and as many with all
_GAIN = 1.1  # speed-up below which further threads mostly wait


class ThreadTimer:
    """Chooses between one CPU thread and all, by timing both in turn in the first steps of a phase.

    One thread is chosen unless all are faster by a tenth. The steps are those of the run: timing costs nothing, and
    changes results by no more than the rounding of sums that are split over threads.

    Args:
        chosen: phase -> threads, filled in as they are chosen; a phase in it is not timed again.
        available: threads to choose from.
    """

    def __init__(self, chosen: dict[int, int], available: int) -> None:
        self.chosen, self._available = chosen, available
        self._phase: int | None = None

    def begin(self, phase: int) -> None:
        """Begin a phase: with the threads chosen for it, or with timing."""
        if phase == self._phase:
            return
        self._phase, self._steps = phase, 0
        self._seconds: dict[int, list[float]] = {1: [], self._available: []}
        if self._available == 1:
            self.chosen[phase] = 1
        torch.set_num_threads(self.chosen.get(phase, self._available))

    @contextmanager
    def step(self) -> Iterator[list[int]]:
        """Run a step; the block adds the sizes of the step's batches to the list."""
        sizes: list[int] = []
        if self._phase is None or self._phase in self.chosen:
            yield sizes
            return
        threads = 1 if self._steps % 2 else self._available
        torch.set_num_threads(threads)
        begun = perf_counter()
        yield sizes
        if self._steps >= _WARM:
            self._seconds[threads].append((perf_counter() - begun) / sum(sizes))  # the last batch may be smaller
        self._steps += 1
        if self._steps == _WARM + 2 * _TIMED:
            one, every = (statistics.median(self._seconds[number]) for number in (1, self._available))
            self.chosen[self._phase] = self._available if every * _GAIN < one else 1
            torch.set_num_threads(self.chosen[self._phase])


@contextmanager
def cpu_threads(threads: int | None) -> Iterator[None]:
    """Limit torch to so many CPU threads, None: as many as now, and restore their number at the end of the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
