"""Batches of data of any kind: held and indexed if it fits, else streamed."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from conservtl.batches import as_tensor
from conservtl.data import Examples, Sequences
from conservtl.engine.batch import Batches, Cut, Order
from conservtl.engine.buckets import BucketedBatches
from conservtl.engine.held import Held
from conservtl.engine.holding import Holding
from conservtl.engine.processes import ALONE
from conservtl.engine.randomness import preserve_rng
from conservtl.engine.streamed import Bucketed, Streamed
from conservtl.engine.workers import worker_loader
from conservtl.errors import DataError, SpecError

__all__ = ["Contents", "as_batches", "undivided"]

_MOST_SECONDS = 600.0  # of a batch of sequences without a bound of its own


class Contents:
    """Iterable over the contents of batches as they are, without advancing the random generators of training."""

    def __init__(self, batches: Batches) -> None:
        self._batches = batches.plain()

    def __iter__(self) -> Iterator[Any]:
        with preserve_rng():
            batches = self._batches.epoch()
        return (batch.content for batch in batches if batch.size)


def as_batches(
    data: Any,
    batch_size: int | Cut,
    device: torch.device,
    *,
    shuffle: bool,
    seconds: float | None = None,
    step_seconds: float | None = None,
    holding: Holding | None = None,
    workers: int | None = None,
) -> Batches:
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
        step_seconds: duration of all batches of a step of ``Sequences`` at most, those of all processes; None: as many
            batches as the settings say.
        holding: decides where tensors are held; None: on the device if they fit.
        workers: processes that load the examples of a dataset; None: loaded as in a loop written by hand.

    Raises:
        DataError: the data is of another kind, or empty.
    """
    cut = batch_size if isinstance(batch_size, Cut) else Cut(batch_size, shuffle)
    if isinstance(data, Batches):
        return data
    if isinstance(data, Sequences):
        return _by_length(data, cut, device, seconds, step_seconds, holding)
    if step_seconds is not None:
        raise SpecError(
            f"training.step_seconds is {step_seconds:g}, but data of type {type(data).__name__} has no durations. Set "
            "training.accumulate, or pass Sequences."
        )
    if isinstance(data, Examples):
        return Held(_rows((data.inputs, data.labels)), cut, device, holding=holding, names=data.names)
    if isinstance(data, TensorDataset):
        data = data.tensors
    if isinstance(data, (tuple, list)) and any(isinstance(one, (Tensor, np.ndarray)) for one in data):
        return Held(_rows(data), cut, device, holding=holding)
    if isinstance(data, Mapping):
        return Held(_named(data), cut, device, holding=holding)
    if isinstance(data, Dataset):
        return _loaded(data, cut, device, workers)
    if isinstance(data, (Iterator, str, bytes)) or not isinstance(data, Iterable):
        raise DataError(
            "data must be Examples, tensors, a dataset or an iterable of batches that can be iterated repeatedly "
            f"(a DataLoader, a list); received {type(data).__name__}."
        )
    return Streamed(data, device)


def _by_length(
    data: Sequences,
    cut: Cut,
    device: torch.device,
    seconds: float | None,
    step_seconds: float | None,
    holding: Holding | None,
) -> Bucketed:
    if not data:
        raise DataError("data: the sequences hold no examples.")
    bound = min(_MOST_SECONDS, step_seconds or _MOST_SECONDS) if seconds is None else seconds
    part = (cut.processes.rank, cut.processes.world) if cut.shuffle else (0, 1)
    most = max(1, cut.size // cut.processes.world)
    data = data.on(device, (holding or Holding()).place)
    return Bucketed(BucketedBatches(data, most, bound, shuffle=cut.shuffle, part=part, step=step_seconds), device)


def _rows(data: Sequence[Any]) -> tuple[Tensor, ...]:
    tensors = tuple(map(as_tensor, data))
    if kinds := _no_tensors(enumerate(tensors)):
        raise DataError(
            f"data: a {type(data).__name__} must hold tensors or arrays with one row per example; received "
            f"{kinds}. For a list of batches, put each batch into a tuple of its own."
        )
    return tensors


def _named(data: Mapping[Any, Any]) -> dict[Any, Tensor]:
    content = {key: as_tensor(value) for key, value in data.items()}
    if (kinds := _no_tensors(content.items())) or not data:
        raise DataError(
            f"data: a dictionary must hold tensors or arrays with one row per example; received {kinds}. Convert "
            "or leave out the others."
        )
    return content


def _loaded(data: Any, cut: Cut, device: torch.device, workers: int | None) -> Streamed:
    """Return the batches of a dataset, loaded by a DataLoader or by so many workers."""
    pinned = device.type == "cuda"
    if isinstance(data, IterableDataset):
        loader: Any = DataLoader(data, batch_size=-(-cut.size // cut.processes.world), pin_memory=pinned)
        return Streamed(loader, device, sized=True)
    if not len(data):
        raise DataError("data: the dataset has no examples.")
    order = Order(len(data), cut)
    if workers is None:
        loader = DataLoader(data, batch_sampler=order, pin_memory=pinned, generator=cut.generator)
    else:
        loader = worker_loader(data, order, workers, pinned=pinned)
    return Streamed(loader, device, order)


def undivided(batches: Batches) -> Batches:
    """Return the batches of all processes' parts."""
    if batches.cut is None or not batches.processes.many:
        return batches
    cut = replace(batches.cut, processes=ALONE)
    if isinstance(batches, Held):
        held = copy.copy(batches)
        held.cut = cut
        return held
    streamed: Any = batches
    return as_batches(streamed.loader.dataset, cut, batches.device, shuffle=False)


def _no_tensors(parts: Iterable[tuple[Any, Any]]) -> dict[Any, str]:
    """Return the types of those parts that are no tensors."""
    return {key: type(value).__name__ for key, value in parts if not isinstance(value, Tensor)}
