"""A batch on the device, and the batches whose gradients make one step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch import Tensor

from conservtl.engine.buckets import StepShare

__all__ = ["Batch", "Waiting", "examples_of", "in_steps"]


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
