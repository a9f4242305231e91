"""Ctrl-C handled between two steps, so that a run stops in a complete state."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["Interruption", "interruptible"]


class Interruption:
    """Whether Ctrl-C has been pressed."""

    asked = False


@contextmanager
def interruptible(active: bool) -> Iterator[Interruption]:
    """Record a first Ctrl-C inside the block; a second one interrupts at once.

    Args:
        active: whether to do so; any thread but the main one leaves Ctrl-C as it is.
    """
    stop = Interruption()
    if not active or threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.getsignal(signal.SIGINT)

    def record(number: int, frame: Any) -> None:
        if stop.asked and callable(before):
            before(number, frame)
        stop.asked = True

    signal.signal(signal.SIGINT, record)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)
