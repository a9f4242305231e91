"""Ctrl-C and SIGTERM handled between two steps, so that a run stops in a complete state."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from conservtl.engine.processes import Processes
from conservtl.errors import Terminated

__all__ = ["Interruption", "interruptible"]


class Interruption:
    """The signal received first: SIGINT (Ctrl-C), SIGTERM, or none."""

    def __init__(self, *, shared: bool = False) -> None:
        self.received: int | None = None
        self._pending: int | None = None  # received by this process of many, the others of which do not know of it yet
        self._shared = shared

    @property
    def asked(self) -> bool:
        """Whether to stop."""
        return self.received is not None

    def agree(self, processes: Processes, *, late: bool = False) -> bool:
        """Take over a signal that another process received; return whether one of them is ``late``.

        All processes call this together and stop after the same step. ``late``: this process finds a checkpoint due.
        """
        if processes.many:
            received, due = processes.largest(self.received or self._pending or 0, int(late))
            self.received, late = received or None, bool(due)
        return late

    def record(self, number: int) -> bool:
        """Take a signal; return whether it is the first."""
        if self.received is not None or self._pending is not None:
            return False
        if self._shared:  # it counts once all processes know of it
            self._pending = number
        else:
            self.received = number
        return True

    def stop(self) -> None:
        """Raise KeyboardInterrupt if the signal received is SIGINT, Terminated if it is SIGTERM."""
        raise Terminated if self.received == signal.SIGTERM else KeyboardInterrupt


@contextmanager
def interruptible(active: bool, *, shared: bool = False) -> Iterator[Interruption]:
    """Record a first signal inside the block; a second one acts at once, as it did before the block.

    Unless ``active``, and in any thread but the main one, signals stay as they are. With other processes (``shared``) a
    signal counts once they ``agree``.
    """
    interruption = Interruption(shared=shared)
    if not active or threading.current_thread() is not threading.main_thread():
        yield interruption
        return

    def record(number: int, _: Any) -> None:
        if not interruption.record(number):
            signal.signal(number, before[number])
            signal.raise_signal(number)

    # None: a handler that was not installed from Python.
    before: dict[int, Any] = {
        number: signal.getsignal(number) or signal.SIG_DFL for number in (signal.SIGINT, signal.SIGTERM)
    }
    for number in before:
        signal.signal(number, record)
    try:
        yield interruption
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
