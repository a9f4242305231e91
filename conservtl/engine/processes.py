"""The processes that train one model together: their numbers, what they tell each other, and which of them is lost."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch
from torch import distributed as dist

from conservtl.compat import default_store
from conservtl.engine.joining import join, must_join, restarts
from conservtl.errors import ConservtlError, ProcessLostError

__all__ = [
    "ALONE",
    "Processes",
    "connected",
    "current",
    "is_main_process",
    "lost_processes",
    "names_lost",
    "restarted",
]

_Value = TypeVar("_Value")

_PATIENCE = 10.0  # seconds in which a process that is alive says so after a connection broke
_LOST = re.compile(r"connection (closed|reset|refused)|broken pipe|timed out|gloo|nccl|socket|peer", re.IGNORECASE)


class Processes:
    """Processes that train one model, or this one alone.

    They talk over a group of their own on the CPU (gloo): a word between two steps waits for no GPU.

    Args:
        rank: of this process, from 0.
        world: number of processes.
        group: the process group on the CPU; None for one process.
    """

    def __init__(self, rank: int = 0, world: int = 1, group: Any = None) -> None:
        self.rank, self.world, self._group = rank, world, group
        self.many = world > 1
        """Whether there are others."""

    @property
    def main(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def gathered(self, value: _Value) -> list[_Value]:
        """Return the values of all processes, by rank; all of them call this together."""
        if not self.many:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self._group)
        return values

    def gathered_at_first(self, value: _Value) -> list[_Value]:
        """Return the values of all processes in the first, and none in the others; all of them call this together."""
        if not self.many:
            return [value]
        values: list[Any] | None = [None] * self.world if self.main else None
        dist.gather_object(value, values, dst=0, group=self._group)
        return values or []

    def in_first(self, call: Callable[[], object]) -> None:
        """Call a function in the first process; what it raises there is raised in all, which wait for it."""
        caught: Exception | None = None
        if self.main:
            try:
                call()
            except Exception as error:  # noqa: BLE001 - raised again
                caught = error
        if (caught := self.first(caught)) is not None:
            raise caught

    def first(self, value: _Value) -> _Value:
        """Return the value of the first process; all of them call this together."""
        if not self.many:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self._group)
        return values[0]

    def largest(self, *numbers: int) -> tuple[int, ...]:
        """Return the largest of all processes' numbers, place by place; all of them call this together."""
        if not self.many:
            return numbers
        together = torch.tensor(numbers, dtype=torch.int64)
        dist.all_reduce(together, dist.ReduceOp.MAX, group=self._group)
        return tuple(together.tolist())

    def average(self, tensors: list[torch.Tensor]) -> None:
        """Replace tensors by their means over all processes; all of them call this together."""
        if not self.many or not tensors:
            return
        together = torch.cat([tensor.detach().double().cpu().flatten() for tensor in tensors])
        dist.all_reduce(together, group=self._group)
        parts = torch.split(together / self.world, [tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.many:
            dist.barrier(group=self._group)


ALONE = Processes()
"""One process."""

_known: list[Any] = [None, ALONE]  # the default process group, and what was made of it


def current() -> Processes:
    """Return the processes that are connected; all of them make the first call together."""
    if not (dist.is_available() and dist.is_initialized()):
        return ALONE if is_main_process() else Processes(int(os.environ["RANK"]))
    if dist.get_world_size() == 1:
        return ALONE
    if _known[0] is not dist.group.WORLD:
        group = dist.new_group(backend="gloo")
        _known[:] = [dist.group.WORLD, Processes(dist.get_rank(), dist.get_world_size(), group)]
    processes: Processes = _known[1]
    return processes


def is_main_process() -> bool:
    """Return whether this is the only process, or the first: before they are connected, the launcher says it."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return int(os.environ.get("RANK", "0")) == 0


def restarted(processes: Processes) -> bool:
    """Return whether the launcher has started processes anew after one was lost; all of them call this together."""
    return processes.largest(restarts())[0] > 0


@contextmanager
def connected(device: str) -> Iterator[Processes]:
    """Connect the processes that a launcher started for the block; leave a connection that is there as it is."""
    if mine := must_join():
        join(device)
    try:
        processes = current()
        with names_lost(processes):
            yield processes
    except ConservtlError as error:
        if mine and not isinstance(error, ProcessLostError):
            error.own = not _said_by_first(str(error))
        raise
    finally:
        if mine:
            with suppress(RuntimeError):  # a connection that broke
                dist.destroy_process_group()


@contextmanager
def names_lost(processes: Processes) -> Iterator[None]:
    """Turn the error of a connection that broke inside the block into one that names the lost processes."""
    try:
        yield
    except RuntimeError as error:
        lost = lost_processes(processes, error)
        if lost is None:
            raise
        raise lost from error


def lost_processes(processes: Processes, error: RuntimeError) -> ProcessLostError | None:
    """Return the error to raise in the place of one that a broken connection caused; None for any other error."""
    broken = isinstance(error, dist.DistError) or (type(error) is RuntimeError and _LOST.search(str(error)))
    if not processes.many or isinstance(error, ProcessLostError) or not broken:
        return None
    alive = _alive(processes)
    return ProcessLostError(sorted({*range(processes.world)} - alive), processes.world, first=min(alive))


def _alive(processes: Processes) -> set[int]:
    """Return the processes that answer: each says in the launcher's store that it is alive."""
    found, begun = {processes.rank}, time.monotonic()
    try:
        store = default_store()
        store.set(_answer(processes.rank), "alive")
        while (waited := time.monotonic() - begun) < _PATIENCE:
            found |= {rank for rank in range(processes.world) if rank not in found and store.check([_answer(rank)])}
            if len(found) >= processes.world - 1 and waited > 1:
                break
            time.sleep(0.05)
    except RuntimeError:  # the first process, which may hold the store, took it along
        return {rank for rank in range(processes.world) if rank > 0}
    return found


def _said_by_first(message: str) -> bool:
    """Return whether this is another process than the first, which ends with the same message."""
    key = "conservtl/message"
    with suppress(RuntimeError):  # the store went with the first process
        store = default_store()
        if dist.get_rank() == 0:
            store.set(key, message)
            return False
        begun = time.monotonic()
        while time.monotonic() - begun < 1:
            if store.check([key]):
                return bool(store.get(key).decode() == message)
            time.sleep(0.02)
    return False


def _answer(rank: int) -> str:
    return f"conservtl/alive/{rank}"
