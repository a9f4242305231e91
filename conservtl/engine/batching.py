"""Batches: held on the device and indexed there where the data fits, streamed where it does not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from conservtl.batches import batch_size as size_of
from conservtl.batches import map_tensors, to_device
from conservtl.data import Examples
from conservtl.engine.randomness import preserve_rng
from conservtl.errors import DataError

__all__ = ["Batch", "Contents", "Held", "Streamed", "Waiting", "as_batches"]

_SHARE = 0.5  # of the device's free memory that held data may take


@dataclass(frozen=True)
class Batch:
    """What a step gets.

    Args:
        content: what the model's ``forward`` and ``loss`` take: a tuple or a dictionary of tensors.
        size: number of examples.
        index: positions of the examples in the data, where it is held; None where it streams.
    """

    content: Any
    size: int
    index: Tensor | None = None


Waiting = Callable[[], Batch]


class Contents:
    """The contents of batches, to be gone through again; the order that training draws is not touched.

    Args:
        batches: as ``as_batches`` gives them.
    """

    def __init__(self, batches: Held | Streamed) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[Any]:
        with preserve_rng():
            batches = self._batches.epoch()
        return (batch.content for batch in batches)


class Held:
    """Tensors on the device, batched by index.

    Shuffled with one ``torch.randperm`` an epoch from the global generator, as a loop written by hand
    would be. A last batch of one example joins the batch before it: batch norm cannot train on one.

    Args:
        content: tensors of the same length, in a tuple or a dictionary.
        batch_size: examples a batch and process.
        device: where they are held, if they fit.
        shuffle: whether the order is drawn anew each epoch.
        part: (rank, number of processes).
    """

    generators: tuple[torch.Generator, ...] = ()

    def __init__(
        self,
        content: tuple[Tensor, ...] | dict[str, Tensor],
        batch_size: int,
        device: torch.device,
        shuffle: bool,
        part: tuple[int, int] = (0, 1),
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
        fits = _fits(sum(tensor.nbytes for tensor in tensors), device)
        self._content: Any = map_tensors(content, lambda tensor: tensor.to(device)) if fits else content
        self._place = device if fits else torch.device("cpu")

    def count(self) -> int:
        """Batches an epoch."""
        return len(self._cuts)

    def epoch(self, skip: int = 0) -> Iterator[Batch]:
        """Return the batches of an epoch but the first ``skip``; their order is drawn when this is called."""
        return (make() for make in self.waiting(skip))

    def waiting(self, skip: int = 0) -> Iterator[Waiting]:
        """Return the same batches as functions that put them on the device."""
        order = _order(self.length, self.shuffle, self.part, self.device).to(self._place)
        rank, world = self.part
        parts = (index[rank::world] if world > 1 else index for index in torch.split(order, self._cuts)[skip:])
        return (partial(self._batch, own) for own in parts)

    def take(self, index: Tensor) -> Any:
        """The examples at these positions, on the device."""
        return map_tensors(
            self._content, lambda tensor: tensor.index_select(0, index.to(tensor.device)).to(self.device)
        )

    def _batch(self, index: Tensor) -> Batch:
        return Batch(self.take(index), len(index), index)


class Streamed:
    """Batches from a DataLoader or any iterable that can be gone through again."""

    def __init__(self, loader: Iterable[Any], device: torch.device) -> None:
        self.loader = loader
        self.device = device

    @property
    def generators(self) -> tuple[torch.Generator, ...]:
        """Generators of the loader's own, which a checkpoint has to keep."""
        batches = getattr(self.loader, "batch_sampler", None)
        owners = (self.loader, getattr(self.loader, "sampler", None), batches, getattr(batches, "sampler", None))
        found = (getattr(owner, "generator", None) for owner in owners)
        return tuple({id(own): own for own in found if isinstance(own, torch.Generator)}.values())

    def count(self) -> int | None:
        """Batches an epoch, None where the iterable has no length."""
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
        return (partial(self._batch, content) for content in iterator)

    def _batch(self, content: Any) -> Batch:
        moved = to_device(content, self.device)
        return Batch(moved, size_of(moved))


class _Order:
    """A batch sampler: the same batches, shuffle and parts as ``Held`` makes."""

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
    data: Any, batch_size: int, device: torch.device, *, shuffle: bool, part: tuple[int, int] = (0, 1)
) -> Held | Streamed:
    """Batches from whatever data comes as.

    Args:
        data: ``Examples``; a tuple or dictionary of tensors; a ``TensorDataset``; any other dataset of
            examples (loaded by a DataLoader); a DataLoader or another iterable of batches.
        batch_size: examples a batch, where the batches are made here.
        device: where batches are wanted.
        shuffle: whether batches made here are shuffled.
        part: (rank, number of processes); a DataLoader or iterable of your own must see to its part itself.

    Raises:
        DataError: none of these, or empty.
    """
    if isinstance(data, (Held, Streamed)):
        return data
    if isinstance(data, Examples):
        data = (data.inputs, data.labels)
    if isinstance(data, TensorDataset):
        data = data.tensors
    if isinstance(data, (tuple, list)) and data and all(isinstance(t, Tensor) for t in data):
        return Held(tuple(data), batch_size, device, shuffle, part)
    if isinstance(data, Mapping):
        if not data or not all(isinstance(t, Tensor) for t in data.values()):
            kinds = {key: type(value).__name__ for key, value in data.items()}
            raise DataError(f"data: a dictionary must hold tensors with an example a row; received {kinds}.")
        return Held(dict(data), batch_size, device, shuffle, part)
    pinned = device.type == "cuda"
    if isinstance(data, IterableDataset):
        data = DataLoader(data, batch_size=batch_size, pin_memory=pinned)
    elif isinstance(data, Dataset):
        if not len(data):  # type: ignore[arg-type]
            raise DataError("data: the dataset has no examples.")
        data = DataLoader(data, batch_sampler=_Order(len(data), batch_size, shuffle, part), pin_memory=pinned)  # type: ignore[arg-type]
    if isinstance(data, (Iterator, str, bytes)) or not isinstance(data, Iterable):
        raise DataError(
            "data must be Examples, tensors, a dataset or an iterable of batches that can be gone through "
            f"again (a DataLoader, a list); received {type(data).__name__}."
        )
    return Streamed(data, device)


def _cuts(length: int, batch_size: int, world: int) -> list[int]:
    """Examples a batch, all processes together; each process gets as many batches, of the same sizes."""
    total = -(-length // world) * world
    size = batch_size * world
    cuts = [size] * (total // size) + ([total % size] if total % size else [])
    if len(cuts) > 1 and cuts[-1] == world < size:
        cuts[-2:] = [cuts[-2] + cuts[-1]]
    return cuts


def _order(length: int, shuffle: bool, part: tuple[int, int], device: torch.device) -> Tensor:
    """Positions in the order of an epoch; the same for all processes, some twice where they do not divide evenly."""
    order = torch.randperm(length) if shuffle else torch.arange(length)
    world = part[1]
    if world == 1:
        return order
    order = order.to(device)
    torch.distributed.broadcast(order, 0)
    return order[torch.arange(-(-length // world) * world, device=device) % length]


def _fits(size: int, device: torch.device) -> bool:
    return device.type != "cuda" or size < _SHARE * torch.cuda.mem_get_info(device)[0]
