"""Batches of the training and evaluation data: indexed on the device if the data fits, else streamed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
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
from conservtl.engine.holding import Holding
from conservtl.engine.prefetch import ahead
from conservtl.engine.randomness import preserve_rng
from conservtl.engine.workers import WorkerLoader
from conservtl.errors import DataError

__all__ = ["Batch", "Contents", "Held", "Streamed", "Waiting", "as_batches", "examples_of"]

_MOST_SECONDS = 600.0  # of a batch of sequences without a bound of its own


@dataclass(frozen=True)
class Batch:
    """One batch on the device.

    Args:
        content: the batch as ``forward`` and ``loss`` take it, such as a tuple or a dictionary of tensors.
        size: number of examples.
        index: (size,), positions of the examples in held data; None for streamed data.
    """

    content: Any
    size: int
    index: Tensor | None = None


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
        return (batch.content for batch in batches)


class Held:
    """Tensors on the device, batched by index.

    Each epoch is shuffled with one ``torch.randperm`` from the global generator, like a loop written by hand. A last
    batch of one example is joined to the batch before: batch norm cannot train on one example.

    Args:
        content: tensors of the same length N, in a tuple or a dictionary.
        batch_size: examples per batch and process.
        device: device of the batches, and of the data if it fits.
        shuffle: whether to draw a new order each epoch.
        part: (rank, number of processes).
        holding: decides where the data is held; None: on the device if it fits.

    Raises:
        DataError: the tensors differ in length, or are empty.
    """

    generators: tuple[torch.Generator, ...] = ()
    sized = True
    """Whether the batches have the size of the settings."""

    def __init__(
        self,
        content: tuple[Tensor, ...] | dict[str, Tensor],
        batch_size: int,
        device: torch.device,
        shuffle: bool,
        part: tuple[int, int] = (0, 1),
        holding: Holding | None = None,
    ) -> None:
        tensors = list(content.values()) if isinstance(content, dict) else list(content)
        lengths = [len(tensor) if tensor.ndim else 0 for tensor in tensors]
        if len(set(lengths)) != 1 or 0 in lengths:
            raise DataError(f"data: tensors must have one common length above 0; received lengths {lengths}.")
        self.length = lengths[0]
        self.device = device
        self.shuffle = shuffle
        self.part = part
        self._cuts = _cuts(self.length, batch_size, part[1])
        self._place = (holding or Holding()).place(sum(tensor.nbytes for tensor in tensors), device)
        self._names = tuple(content) if isinstance(content, dict) else None
        self._tensors = [tensor.to(self._place) for tensor in tensors]

    def resized(self, batch_size: int) -> Held:
        """Return the same data in batches of another size."""
        other = copy.copy(self)
        vars(other)["_cuts"] = _cuts(self.length, batch_size, self.part[1])
        return other

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
        order = _order(self.length, self.shuffle, self.part, self.device).to(self._place)
        rank, world = self.part
        parts = (index[rank::world] if world > 1 else index for index in torch.split(order, self._cuts)[skip:])
        if self._place.type == self.device.type:
            return (partial(self._batch, rows) for rows in parts)
        return ahead(((rows, self._rows(rows, pinned=True)) for rows in parts), self._moved, self.device)

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
        return Batch(self.take(index), len(index), index)

    def _moved(self, batch: tuple[Tensor, Any]) -> Batch:
        index, rows = batch
        return Batch(to_device(rows, self.device), len(index), index)


class Streamed:
    """Batches from a DataLoader or another iterable that can be iterated repeatedly.

    Args:
        loader: yields the batches.
        device: device of the batches.
        sized: whether the batches have the size of the settings.
    """

    def __init__(self, loader: Iterable[Any], device: torch.device, *, sized: bool = False) -> None:
        self.loader = loader
        self.device = device
        self.sized = sized

    @property
    def generators(self) -> tuple[torch.Generator, ...]:
        """Random generators of the loader, to be saved in checkpoints."""
        batches = getattr(self.loader, "batch_sampler", None)
        owners = (self.loader, getattr(self.loader, "sampler", None), batches, getattr(batches, "sampler", None))
        generators = (getattr(owner, "generator", None) for owner in owners)
        return tuple({id(one): one for one in generators if isinstance(one, torch.Generator)}.values())

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
        return ahead(iterator, self._batch, self.device)

    def _batch(self, content: Any) -> Batch:
        moved = to_device(content, self.device)
        return Batch(moved, size_of(moved))


class _Order:
    """Batch sampler with the same batches, order and parts as ``Held``."""

    def __init__(self, length: int, batch_size: int, shuffle: bool, part: tuple[int, int]) -> None:
        self.length, self.shuffle, self.part = length, shuffle, part
        self._cuts = _cuts(length, batch_size, part[1])

    def __len__(self) -> int:
        return len(self._cuts)

    def __iter__(self) -> Iterator[list[int]]:
        rank, world = self.part
        for index in torch.split(_order(self.length, self.shuffle, self.part, torch.device("cpu")), self._cuts):
            yield index[rank::world].tolist()


def as_batches(
    data: Any,
    batch_size: int,
    device: torch.device,
    *,
    shuffle: bool,
    part: tuple[int, int] = (0, 1),
    seconds: float | None = None,
    holding: Holding | None = None,
    workers: int | None = None,
) -> Held | Streamed:
    """Return the batches of data of any supported kind.

    Args:
        data: ``Examples``; ``Sequences`` (batched by length); a tuple or dictionary of tensors or NumPy arrays
            (float64 arrays become torch's default type); a ``TensorDataset``; another dataset of examples (loaded by a
            DataLoader); a DataLoader or another iterable of batches; or the result of this function.
        batch_size: examples per batch, for data that is not batched yet.
        device: device of the batches.
        shuffle: whether to shuffle data that is not batched yet.
        part: (rank, number of processes); a DataLoader or an iterable must select its part itself.
        seconds: duration of a batch of ``Sequences`` at most, its padding included; None: a bound on memory alone.
        holding: decides where tensors are held; None: on the device if they fit.
        workers: processes that load the examples of a dataset; None: loaded as in a loop written by hand.

    Raises:
        DataError: the data is of another kind, or empty.
    """
    if isinstance(data, (Held, Streamed)):
        return data
    if isinstance(data, Examples):
        data = (data.inputs, data.labels)
    if isinstance(data, Sequences):
        if not data:
            raise DataError("data: the sequences hold no examples.")
        bound = _MOST_SECONDS if seconds is None else seconds
        return Streamed(BucketedBatches(data, batch_size, bound, shuffle=shuffle, part=part), device)
    if isinstance(data, TensorDataset):
        data = data.tensors
    if isinstance(data, (tuple, list)) and data and any(isinstance(one, (Tensor, np.ndarray)) for one in data):
        tensors = tuple(map(as_tensor, data))
        if kinds := _no_tensors(enumerate(tensors)):
            raise DataError(
                f"data: a {type(data).__name__} must hold tensors or arrays with one row per example; received "
                f"{kinds}. For a list of batches, put each batch into a tuple of its own."
            )
        return Held(tensors, batch_size, device, shuffle, part, holding)
    if isinstance(data, Mapping):
        content = {key: as_tensor(value) for key, value in data.items()}
        if (kinds := _no_tensors(content.items())) or not data:
            raise DataError(
                f"data: a dictionary must hold tensors or arrays with one row per example; received {kinds}. Convert "
                "or leave out the others."
            )
        return Held(content, batch_size, device, shuffle, part, holding)
    pinned = device.type == "cuda"
    sized = isinstance(data, Dataset)
    if isinstance(data, IterableDataset):
        data = DataLoader(data, batch_size=batch_size, pin_memory=pinned)
    elif isinstance(data, Dataset):
        if not len(data):  # type: ignore[arg-type]
            raise DataError("data: the dataset has no examples.")
        order = _Order(len(data), batch_size, shuffle, part)  # type: ignore[arg-type]
        if workers is None:
            data = DataLoader(data, batch_sampler=order, pin_memory=pinned)
        else:
            data = WorkerLoader(data, order, workers, pinned=pinned)
    if isinstance(data, (Iterator, str, bytes)) or not isinstance(data, Iterable):
        raise DataError(
            "data must be Examples, tensors, a dataset or an iterable of batches that can be iterated repeatedly "
            f"(a DataLoader, a list); received {type(data).__name__}."
        )
    return Streamed(data, device, sized=sized)


def _no_tensors(parts: Iterable[tuple[Any, Any]]) -> dict[Any, str]:
    """Return the types of those parts that are no tensors."""
    return {key: type(value).__name__ for key, value in parts if not isinstance(value, Tensor)}


def _cuts(length: int, batch_size: int, world: int) -> list[int]:
    """Return the examples per batch of all processes together; each process gets batches of the same sizes."""
    total = -(-length // world) * world
    size = batch_size * world
    cuts = [size] * (total // size) + ([total % size] if total % size else [])
    if len(cuts) > 1 and cuts[-1] == world < size:
        cuts[-2:] = [cuts[-2] + cuts[-1]]
    return cuts


def _order(length: int, shuffle: bool, part: tuple[int, int], device: torch.device) -> Tensor:
    """Return the positions in the order of an epoch, the same for all processes; some twice if they do not divide."""
    order = torch.randperm(length) if shuffle else torch.arange(length)
    world = part[1]
    if world == 1:
        return order
    order = order.to(device)
    torch.distributed.broadcast(order, 0)
    return order[torch.arange(-(-length // world) * world, device=device) % length]
