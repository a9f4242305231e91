"""Processes of this machine, each apart: one that dies takes no other with it, unlike those of a process pool."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing.context import SpawnContext, SpawnProcess
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from conservtl.errors import SpecError

__all__ = ["Processes", "check_main"]

_WORKER = "conservtl worker"
_UNGUARDED = 87  # exit code of a process whose script begins the study again
_GUARD = (
    "processes: each process imports the script that started it, and this one would begin the study again. Put the "
    'call under `if __name__ == "__main__":`.'
)


def check_main() -> None:
    """Raise if this process is still importing the script that started it; a worker of ``Processes`` ends silently."""
    process = multiprocessing.current_process()
    if getattr(process, "_inheriting", False):  # as multiprocessing itself asks
        if process.name == _WORKER:
            os._exit(_UNGUARDED)  # the study's process says why, once for all workers
        raise SpecError(_GUARD)


class _Context(SpawnContext):
    """Starts processes that know that they are workers; keeps the last one."""

    last: BaseProcess | None = None

    def Process(self, *arguments: Any, **named: Any) -> Any:  # type: ignore[override]  # noqa: N802
        """Return a new process."""
        self.last = SpawnProcess(*arguments, **named | {"name": _WORKER})
        return self.last

    @property
    def refused(self) -> bool:
        """Whether the last process ended because its script is not guarded."""
        if self.last is None:
            return False
        self.last.join()
        return self.last.exitcode == _UNGUARDED


class Processes(Executor):
    """Local processes with one thread of torch each.

    Args:
        count: number of processes.
    """

    def __init__(self, count: int) -> None:
        self._threads = ThreadPoolExecutor(count)
        self._own = threading.local()
        self._pools: list[ProcessPoolExecutor] = []

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **named: Any) -> Future[Any]:
        """Call a function in the next process that is free."""
        return self._threads.submit(self._call, function, *arguments, **named)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the processes, after the work that they are doing."""
        self._threads.shutdown(wait=wait, cancel_futures=cancel_futures)
        for pool in self._pools:
            pool.shutdown(wait=wait, cancel_futures=cancel_futures)

    def _call(self, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """Call a function in the process of this thread; the next call after one that died has a new process."""
        pool = getattr(self._own, "pool", None)
        if pool is None:
            self._own.context = _Context()
            pool = self._own.pool = ProcessPoolExecutor(1, mp_context=self._own.context, initializer=_start)
            self._pools.append(pool)
        try:
            return pool.submit(function, *arguments, **named).result()
        except BrokenExecutor:
            self._own.pool = None
            if self._own.context.refused:
                return SpecError(_GUARD)  # work returns its errors; what is raised is the loss of a worker
            raise


def _start() -> None:
    """Use one thread, because the processes share the cores; end when the study's process is killed."""
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)
