"""Ctrl-C and SIGTERM handled between two steps, so that a run stops in a complete state."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from conservtl.errors import Terminated

__all__ = ["Interruption", "interruptible"]


class Interruption:
    """The signal received first: SIGINT (Ctrl-C), SIGTERM, or none."""

    received: int | None = None

    @property
    def asked(self) -> bool:
        """Whether to stop."""
        return self.received is not None

    def stop(self) -> None:
        """Raise the exception of the signal received.

        Raises:
            KeyboardInterrupt: it is SIGINT.
            Terminated: it is SIGTERM.
        """
        raise Terminated if self.received == signal.SIGTERM else KeyboardInterrupt


@contextmanager
def interruptible(active: bool) -> Iterator[Interruption]:
    """Record a first signal inside the block; a second one acts at once, as it did before the block.

    Args:
        active: whether to do so; any thread but the main one leaves signals as they are.
    """
    interruption = Interruption()
    if not active or threading.current_thread() is not threading.main_thread():
        yield interruption
        return

    def record(number: int, _: Any) -> None:
        if interruption.asked:
            signal.signal(number, before[number])
            signal.raise_signal(number)
        interruption.received = number

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
