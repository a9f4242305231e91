"""Batches of the training and evaluation data: indexed on the device if the data fits, else streamed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from conservtl.batches import as_tensor, take_rows, to_device
from conservtl.batches import batch_size as size_of
from conservtl.data import Examples, Sequences
from conservtl.engine.buckets import BucketedBatches
from conservtl.engine.cuts import Cut, Order
from conservtl.engine.holding import Holding
from conservtl.engine.prefetch import ahead
from conservtl.engine.processes import ALONE, Processes
from conservtl.engine.randomness import preserve_rng
from conservtl.engine.workers import WorkerLoader
from conservtl.errors import DataError

__all__ = ["Batch", "Contents", "Held", "Streamed", "Waiting", "as_batches", "examples_of", "undivided"]

_MOST_SECONDS = 600.0  # of a batch of sequences without a bound of its own


@dataclass(frozen=True)
class Batch:
    """One batch on the device.

    Args:
        content: the batch as ``forward`` and ``loss`` take it, such as a tuple or a dictionary of tensors.
        size: number of examples that count; 0 for a stand-in, where a batch has fewer examples than processes.
        index: (size,), positions of the examples in held data; None for streamed data.
        together: number of examples of all processes' parts, for their mean; None: the part is not known.
        processes: number of processes that share the batch.
    """

    content: Any
    size: int
    index: Tensor | None = None
    together: int | None = None
    processes: int = 1

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


class Contents:
    """Iterable over the contents of batches, without advancing the random generators of training.

    Args:
        batches: from ``as_batches``.
    """

    def __init__(self, batches: Held | Streamed) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[Any]:
        with preserve_rng():
            batches = self._batches.epoch()
        return (batch.content for batch in batches if batch.size)


class Held:
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

    Raises:
        DataError: the tensors differ in length, or are empty.
    """

    sized = True
    """Whether the batches have the size of the settings."""

    def __init__(
        self,
        content: tuple[Tensor, ...] | dict[str, Tensor],
        batch_size: int | Cut,
        device: torch.device,
        shuffle: bool = False,
        holding: Holding | None = None,
    ) -> None:
        tensors = list(content.values()) if isinstance(content, dict) else list(content)
        lengths = [len(tensor) if tensor.ndim else 0 for tensor in tensors]
        if len(set(lengths)) != 1 or 0 in lengths:
            raise DataError(f"data: tensors must have one common length above 0; received lengths {lengths}.")
        self.length = lengths[0]
        self.device = device
        self.cut = batch_size if isinstance(batch_size, Cut) else Cut(batch_size, shuffle)
        self._cuts = self.cut.sizes(self.length)
        self._place = (holding or Holding()).place(sum(tensor.nbytes for tensor in tensors), device)
        self._names = tuple(content) if isinstance(content, dict) else None
        self._tensors = [tensor.to(self._place) for tensor in tensors]

    def resized(self, batch_size: int) -> Held:
        """Return the same data in batches of another size."""
        other = copy.copy(self)
        other.cut = replace(self.cut, size=batch_size * self.processes.world)
        vars(other)["_cuts"] = other.cut.sizes(self.length)
        return other

    @property
    def generators(self) -> tuple[torch.Generator, ...]:
        """The generator that orders are drawn from, if it is not the global one."""
        return self.cut.generators

    @property
    def processes(self) -> Processes:
        """The processes that share each batch."""
        return self.cut.processes

    @property
    def content(self) -> Any:
        """All examples, where they are held."""
        return tuple(self._tensors) if self._names is None else dict(zip(self._names, self._tensors, strict=True))

    def count(self) -> int:
        """Return the number of batches per epoch."""
        return len(self._cuts)

    def epoch(self, skip: int = 0) -> Iterator[Batch]:
        """Return the batches of an epoch but the first ``skip``; their order is drawn when this is called."""
        return (make() for make in self.waiting(skip))

    def waiting(self, skip: int = 0) -> Iterator[Waiting]:
        """Return the same batches as functions that put them on the device."""
        parts = torch.split(self.cut.order(self.length).to(self._place), self._cuts)[skip:]
        if self._place.type == self.device.type:
            return (partial(self._batch, index) for index in parts)
        read = ((index, self._rows(self.cut.part(index)[0], pinned=True)) for index in parts)
        return ahead(read, self._moved, self.device)

    def take(self, index: Tensor) -> Any:
        """Return the examples at these positions, on the device."""
        return to_device(self._rows(index), self.device)

    def _rows(self, index: Tensor, *, pinned: bool = False) -> Any:
        """Return the examples at these positions where they are held, in pinned memory if they are to be copied."""
        rows = [take_rows(tensor, index.to(tensor.device)) for tensor in self._tensors]
        if pinned and torch.cuda.is_available():
            rows = [row.pin_memory() for row in rows]
        return tuple(rows) if self._names is None else dict(zip(self._names, rows, strict=True))

    def _batch(self, index: Tensor) -> Batch:
        return self._parted(index, self.take(self.cut.part(index)[0]))

    def _moved(self, batch: tuple[Tensor, Any]) -> Batch:
        index, content = batch
        return self._parted(index, to_device(content, self.device))

    def _parted(self, index: Tensor, content: Any) -> Batch:
        """Return this process's part of a batch, given the positions of all parts."""
        rows, size = self.cut.part(index)
        if not self.processes.many:
            return Batch(content, size, rows)
        return Batch(content, size, rows, len(index), self.processes.world)


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

    def waiting(self, skip: int = 0) -> Iterator[Waiting]:
        """Return the same batches as functions that put them on the device."""
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


def as_batches(
    data: Any,
    batch_size: int | Cut,
    device: torch.device,
    *,
    shuffle: bool,
    seconds: float | None = None,
    holding: Holding | None = None,
    workers: int | None = None,
) -> Held | Streamed:
    """Return the batches of data of any supported kind.

    Args:
        data: ``Examples``; ``Sequences`` (batched by length); a tuple or dictionary of tensors or NumPy arrays
            (float64 arrays become torch's default type); a ``TensorDataset``; another dataset of examples (loaded by a
            DataLoader); a DataLoader or another iterable of batches; or the result of this function.
        batch_size: examples per batch, or batches with parts for each of many processes, for data that is not batched
            yet. A DataLoader or an iterable must select its part itself. Of batches of ``Sequences`` each process gets
            whole ones to train on, and all to evaluate.
        device: device of the batches.
        shuffle: whether to shuffle data that is not batched yet.
        seconds: duration of a batch of ``Sequences`` at most, its padding included; None: a bound on memory alone.
        holding: decides where tensors are held; None: on the device if they fit.
        workers: processes that load the examples of a dataset; None: loaded as in a loop written by hand.

    Raises:
        DataError: the data is of another kind, or empty.
    """
    cut = batch_size if isinstance(batch_size, Cut) else Cut(batch_size, shuffle)
    if isinstance(data, (Held, Streamed)):
        return data
    if isinstance(data, Examples):
        data = (data.inputs, data.labels)
    if isinstance(data, Sequences):
        if not data:
            raise DataError("data: the sequences hold no examples.")
        bound = _MOST_SECONDS if seconds is None else seconds
        part = (cut.processes.rank, cut.processes.world) if cut.shuffle else (0, 1)
        most = max(1, cut.size // cut.processes.world)
        return Streamed(BucketedBatches(data, most, bound, shuffle=cut.shuffle, part=part), device)
    if isinstance(data, TensorDataset):
        data = data.tensors
    if isinstance(data, (tuple, list)) and data and any(isinstance(one, (Tensor, np.ndarray)) for one in data):
        tensors = tuple(map(as_tensor, data))
        if kinds := _no_tensors(enumerate(tensors)):
            raise DataError(
                f"data: a {type(data).__name__} must hold tensors or arrays with one row per example; received "
                f"{kinds}. For a list of batches, put each batch into a tuple of its own."
            )
        return Held(tensors, cut, device, holding=holding)
    if isinstance(data, Mapping):
        content = {key: as_tensor(value) for key, value in data.items()}
        if (kinds := _no_tensors(content.items())) or not data:
            raise DataError(
                f"data: a dictionary must hold tensors or arrays with one row per example; received {kinds}. Convert "
                "or leave out the others."
            )
        return Held(content, cut, device, holding=holding)
    pinned = device.type == "cuda"
    sized = isinstance(data, Dataset)
    if isinstance(data, IterableDataset):
        data = DataLoader(data, batch_size=-(-cut.size // cut.processes.world), pin_memory=pinned)
    elif isinstance(data, Dataset):
        if not len(data):  # type: ignore[arg-type]
            raise DataError("data: the dataset has no examples.")
        order = Order(len(data), cut)  # type: ignore[arg-type]
        loader: Any
        if workers is None:
            loader = DataLoader(data, batch_sampler=order, pin_memory=pinned, generator=cut.generator)
        else:
            loader = WorkerLoader(data, order, workers, pinned=pinned, generator=cut.generator)
        return Streamed(loader, device, order)
    if isinstance(data, (Iterator, str, bytes)) or not isinstance(data, Iterable):
        raise DataError(
            "data must be Examples, tensors, a dataset or an iterable of batches that can be iterated repeatedly "
            f"(a DataLoader, a list); received {type(data).__name__}."
        )
    return Streamed(data, device, sized=sized)


def undivided(batches: Held | Streamed) -> Held | Streamed:
    """Return the batches of all processes' parts."""
    if not batches.processes.many:
        return batches
    if isinstance(batches, Held):
        held = copy.copy(batches)
        held.cut = replace(batches.cut, processes=ALONE)
        return held
    loader: Any = batches.loader
    order = loader.batch_sampler
    return as_batches(loader.dataset, replace(order.cut, processes=ALONE), batches.device, shuffle=False)


def _no_tensors(parts: Iterable[tuple[Any, Any]]) -> dict[Any, str]:
    """Return the types of those parts that are no tensors."""
    return {key: type(value).__name__ for key, value in parts if not isinstance(value, Tensor)}
