"""Training data in batches of another size: sizes to try, the batches that take most memory, the data in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset

from conservtl.batches import to_device
from conservtl.data import Sequences
from conservtl.engine.batch import Batches
from conservtl.engine.batching import as_batches
from conservtl.engine.buckets import BucketedBatches
from conservtl.engine.held import Held
from conservtl.engine.preparation import training_batches
from conservtl.engine.randomness import generator_states, restore_generators
from conservtl.engine.session import Session
from conservtl.engine.streamed import Bucketed, Streamed
from conservtl.engine.training import with_found
from conservtl.errors import SpecError

__all__ = ["Sizes", "resized", "sizes_of"]

_ON_CPU = 64  # largest size that is tried on a CPU, which swaps long before it runs out of memory
_MOST = 1 << 20
_SUBJECT = "training.batch_size is auto, but"


@dataclass(frozen=True)
class Sizes:
    """Sizes of batches to choose from.

    Args:
        candidates: ascending: examples, or how many of the longest sequences.
        largest: size -> functions that return the batches of that size which take most memory.
        settings: size -> settings that make batches of it.
        unit: of a size, for a message.
    """

    candidates: Sequence[int]
    largest: Callable[[int], Sequence[Callable[[], Any]]]
    settings: Callable[[int], Mapping[str, Any]]
    unit: str = "example"


def sizes_of(session: Session, train: Any, batches: Batches) -> Sizes:
    """Return the sizes that training data can be batched by.

    Raises:
        SpecError: the data has batches of its own, or the settings do not fit it or the number of processes.
    """
    if isinstance(batches, Bucketed):
        return _of_sequences(session, batches.loader)
    training, world, cuda = session.training, session.processes.world, session.device.type == "cuda"
    together = training.global_batch_size
    if together is not None and together % world:
        raise SpecError(
            f"training.global_batch_size must be a multiple of the number of processes, {world}; received {together}. "
            f"Set it to {together // world * world or world}."
        )
    if isinstance(batches, Held):
        length: int | None = batches.length
        one = partial(_held, batches)
    else:
        _reloaded(train, 1)  # raises if it cannot be
        length, one = _length(train), partial(_loaded, session, train, sized=_length(train) is not None)
    share = None if together is None else together // world
    most = min(_MOST if length is None else max(1, length // world), _MOST if cuda else _ON_CPU)

    def settings(size: int) -> Mapping[str, Any]:
        return {"batch_size": size, "accumulate": training.accumulate if share is None else share // size}

    return Sizes(_candidates(most, share), lambda size: [partial(one, size)], settings)


def resized(session: Session, train: Any, batches: Batches | None = None) -> Batches:
    """Return the training data in batches of the size that was found and is in the session's settings."""
    size = session.training.known_batch_size
    if isinstance(batches, Held):
        return batches.resized(size)
    if isinstance(train, DataLoader):
        divided = getattr(session.accelerator, "split_batches", False)
        train = _reloaded(train, size * session.processes.world if divided else size)
    made = training_batches(session, train)
    if isinstance(made, Streamed):
        made.sized = True
    return made


def _candidates(most: int, together: int | None) -> list[int]:
    """Return the sizes to try: powers of two, or divisors of the examples per step."""
    if together is not None:
        sizes = [number for number in range(1, min(most, together) + 1) if together % number == 0]
    else:
        sizes = _powers(most)
    return sizes[1:] or sizes  # one example, on which batch norm cannot train, is the last resort


def _powers(most: float) -> list[int]:
    return [2**power for power in range(21) if 2**power <= most]


def _held(batches: Held, size: int) -> Any:
    return batches.take(torch.arange(size) % batches.length)


def _loaded(session: Session, train: Any, size: int, *, sized: bool) -> Any:
    """Return the first batch of so many examples; random generators of the data's own stay."""
    loader = _reloaded(train, size, alone=True)
    loaded = as_batches(loader, size, session.device, shuffle=False)
    states = generator_states(loaded.generators)
    try:
        batch = next(iter(loaded.epoch()), None)
    finally:
        restore_generators(states, loaded.generators)
    if batch is None or (not sized and batch.size < size):
        raise torch.OutOfMemoryError("the data has fewer examples")  # a size that it cannot fill is not taken
    return batch.content


def _length(train: Any) -> int | None:
    if isinstance(train, DataLoader):
        kept = train.batch_sampler.sampler if isinstance(train.batch_sampler, BatchSampler) else None
        return None if isinstance(train.dataset, IterableDataset) or not isinstance(kept, Sized) else len(kept)
    return len(train) if isinstance(train, Sized) else None


def _reloaded(train: Any, size: int, *, alone: bool = False) -> Any:
    """Return a DataLoader like this one with batches of another size; a dataset as it is.

    ``alone`` leaves out further processes and pinned memory.
    """
    if isinstance(train, Dataset):
        return train
    batches: Any = getattr(train, "batch_sampler", None)
    reason = ""
    if not isinstance(train, DataLoader):
        reason = f"a {type(train).__name__} yields batches of its own. Pass tensors, a dataset or a DataLoader"
    elif type(train) is not DataLoader:
        reason = f"only a plain DataLoader can be made anew; received a {type(train).__name__}. Pass its dataset"
    elif batches is None:
        reason = "the DataLoader has batch_size=None, so its dataset makes the batches. Give it a batch_size"
    elif type(batches) is not BatchSampler:
        reason = f"the DataLoader's {type(batches).__name__} makes the batches. Give it a sampler instead"
    if reason:
        raise SpecError(f"{_SUBJECT} the data comes in batches of its own: {reason}, or name a number.")
    kept: dict[str, Any] = {"sampler": batches.sampler, "drop_last": batches.drop_last}
    if isinstance(train.dataset, IterableDataset):
        del kept["sampler"]
    names = ["collate_fn", "worker_init_fn", "generator"]
    if not alone:
        names += ["num_workers", "pin_memory", "timeout", "multiprocessing_context", "prefetch_factor"]
        names += ["persistent_workers", "pin_memory_device"]
        names += ["in_order"] if hasattr(train, "in_order") else []  # since torch 2.7
    return DataLoader(train.dataset, batch_size=size, **kept, **{name: getattr(train, name) for name in names})


def _of_sequences(session: Session, batches: BucketedBatches) -> Sizes:
    """Return sizes of batches of sequences: in seconds, or in sequences if the settings have the seconds."""
    training, data = session.training, batches.data
    if training.global_batch_size is not None:
        raise SpecError(
            f"training.global_batch_size counts examples, received {training.global_batch_size}, but sequences of "
            "different lengths are batched by seconds. Set step_seconds instead."
        )
    most = min(len(data), _MOST if session.device.type == "cuda" else _ON_CPU)
    seconds = training.batch_seconds
    longest = max(data.seconds) * (data.durations or (1.0, 1.0))[1]

    def settings(size: int) -> Mapping[str, Any]:
        return {"batch_size": size} if seconds else {"batch_size": most, "batch_seconds": size * longest}

    def largest(size: int) -> Sequence[Callable[[], Any]]:
        made = with_found(training, settings(size))
        dealt = BucketedBatches(data, made.known_batch_size, made.batch_seconds, shuffle=False)
        draw = None if data.durations is None else 0
        return [partial(_padded, data, places, draw, session.device) for places in dealt.largest()]

    if seconds is not None:
        return Sizes(_powers(most), largest, settings)
    bound = min(sum(data.seconds), training.step_seconds or float("inf"))
    return Sizes(_powers(min(bound / max(longest, 1e-9), most)) or [1], largest, settings, "sequence")


def _padded(data: Sequences, places: Sequence[int], draw: int | None, device: torch.device) -> Any:
    return to_device(data.batch(places, draw), device)
