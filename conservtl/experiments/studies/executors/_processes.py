"""Processes of this machine, each apart: one that dies takes no other with it, unlike those of a process pool."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any

import torch

__all__ = ["Processes"]


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
            context = multiprocessing.get_context("spawn")
            pool = self._own.pool = ProcessPoolExecutor(1, mp_context=context, initializer=_start)
            self._pools.append(pool)
        try:
            return pool.submit(function, *arguments, **named).result()
        except BrokenExecutor:
            self._own.pool = None
            raise


def _start() -> None:
    """Use one thread, because the processes share the cores; end when the study's process is killed."""
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)
