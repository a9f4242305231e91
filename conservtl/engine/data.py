"""Batches: held on the device and indexed there where the data fits, streamed where it does not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from conservtl.errors import DataError
from conservtl.tasks.base import Examples

__all__ = ["Batch", "Batches", "Held", "Streamed", "as_batches"]

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


class Batches(Protocol):
    """An epoch of batches at a time; ``len`` is batches an epoch, or None where nobody knows."""

    def count(self) -> int | None:
        """Batches an epoch, None where unknown."""
        ...

    def epoch(self, skip: int = 0) -> Iterator[Batch]:
        """The batches of one epoch, without the first ``skip``."""
        ...


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

    def __init__(
        self,
        content: tuple[Tensor, ...] | dict[str, Tensor],
        batch_size: int,
        device: torch.device,
        shuffle: bool,
        part: tuple[int, int] = (0, 1),
    ) -> None:
        tensors = list(content.values()) if isinstance(content, dict) else list(content)
        lengths = {len(tensor) for tensor in tensors}
        if len(lengths) != 1 or 0 in lengths:
            raise DataError(
                f"data: tensors must have one common length above 0; received lengths {[len(t) for t in tensors]}."
            )
        self.length = lengths.pop()
        self.batch_size = batch_size
        self.device = device
        self.shuffle = shuffle
        self.part = part
        fits = _fits(sum(tensor.nbytes for tensor in tensors), device)
        place = (lambda tensor: tensor.to(device)) if fits else (lambda tensor: tensor)
        self.content: Any = _each(content, place)

    def count(self) -> int:
        """Batches an epoch."""
        return len(self._cuts())

    def epoch(self, skip: int = 0) -> Iterator[Batch]:
        """The batches of one epoch, without the first ``skip``."""
        order = torch.randperm(self.length) if self.shuffle else torch.arange(self.length)
        rank, world = self.part
        if world > 1:
            # Every process must see the same order and the same number of batches.
            torch.distributed.broadcast(order := order.to(self.device), 0)
            order = torch.cat([order, order])[: -(-self.length // world) * world]
        for index in torch.split(order, self._cuts())[skip:]:
            own = index[rank::world]
            yield Batch(self.take(own), len(own), own)

    def take(self, index: Tensor) -> Any:
        """The examples at these positions, on the device."""

        def pick(tensor: Tensor) -> Tensor:
            return tensor[index.to(tensor.device)].to(self.device)

        return _each(self.content, pick)

    def _cuts(self) -> list[int]:
        world = self.part[1]
        total = -(-self.length // world) * world
        size = self.batch_size * world
        cuts = [size] * (total // size) + ([total % size] if total % size else [])
        if len(cuts) > 1 and cuts[-1] == world:
            cuts[-2:] = [cuts[-2] + cuts[-1]]
        return cuts


class Streamed:
    """Batches from a DataLoader or any iterable that can be gone through again."""

    def __init__(self, loader: Iterable[Any], device: torch.device) -> None:
        self.loader = loader
        self.device = device

    def count(self) -> int | None:
        """Batches an epoch, None where the iterable has no length."""
        if not isinstance(self.loader, Sized):
            return None
        try:
            return len(self.loader)
        except TypeError:  # a DataLoader over an iterable dataset has __len__ but no length
            return None

    def epoch(self, skip: int = 0) -> Iterator[Batch]:
        """The batches of one epoch, without the first ``skip``."""
        for number, content in enumerate(self.loader):
            if number >= skip:
                moved = _move(content, self.device)
                yield Batch(moved, _size(moved))


def as_batches(
    data: Any, batch_size: int, device: torch.device, *, shuffle: bool, part: tuple[int, int] = (0, 1)
) -> Held | Streamed:
    """Batches from whatever data comes as.

    Args:
        data: ``Examples``; a tuple or dictionary of tensors; a ``TensorDataset``; any other map-style
            dataset (loaded by a DataLoader); a DataLoader or another iterable of batches.
        batch_size: examples a batch, where the batches are made here.
        device: where batches are wanted.
        shuffle: whether batches made here are shuffled.
        part: (rank, number of processes).

    Raises:
        DataError: none of these, or empty.
    """
    if isinstance(data, Examples):
        data = (data.inputs, data.labels)
    if isinstance(data, TensorDataset):
        data = data.tensors
    if isinstance(data, (tuple, list)) and data and all(isinstance(t, Tensor) for t in data):
        return Held(tuple(data), batch_size, device, shuffle, part)
    if isinstance(data, Mapping) and data and all(isinstance(t, Tensor) for t in data.values()):
        return Held(dict(data), batch_size, device, shuffle, part)
    if isinstance(data, Dataset) and hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        pinned = device.type == "cuda"
        data = DataLoader(data, batch_size=batch_size, shuffle=shuffle, pin_memory=pinned)
    if isinstance(data, Iterator) or not isinstance(data, Iterable):
        raise DataError(
            "data must be Examples, tensors, a dataset or an iterable of batches that can be gone through "
            f"again (a DataLoader, a list); received {type(data).__name__}."
        )
    return Streamed(data, device)


def _each(content: Any, act: Any) -> Any:
    if isinstance(content, dict):
        return {key: act(tensor) for key, tensor in content.items()}
    return tuple(act(tensor) for tensor in content)


def _move(content: Any, device: torch.device) -> Any:
    if hasattr(content, "to"):
        return content.to(device, non_blocking=True)
    if isinstance(content, Mapping):
        return {key: _move(value, device) for key, value in content.items()}
    if isinstance(content, Sequence) and not isinstance(content, str):
        return tuple(_move(value, device) for value in content)
    return content


def _size(content: Any) -> int:
    """Number of examples: the first tensor's length."""
    while not isinstance(content, Tensor):
        parts = list(content.values()) if isinstance(content, Mapping) else list(content)
        content = next((part for part in parts if isinstance(part, (Tensor, Mapping, tuple))), torch.zeros(1))
    return len(content) if content.ndim else 1


def _fits(size: int, device: torch.device) -> bool:
    return device.type != "cuda" or size < _SHARE * torch.cuda.mem_get_info(device)[0]
