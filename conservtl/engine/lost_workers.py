"""Processes that load data and die: noticed between two steps, and named in one sentence."""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

from conservtl.errors import ConservtlError, DataError, LostWorkerError

__all__ = ["Deaths", "between_steps", "named_worker_errors", "worker_error"]

_CHILD: Any = getattr(signal, "SIGCHLD", None)  # Windows has none
_DIED = re.compile(
    r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (?:is killed by signal: ([^.]+)\.|exited unexpectedly)"
)
_RAISED = re.compile(r"Caught (\w+) in DataLoader worker process (\d+)\.")
_MEMORY = "If memory ran out, lower training.num_workers, or the size of a batch"
_GO_ON = "The last good checkpoint is kept: continue with resume"


class Deaths:
    """Hold back, while ``running``, that a process which loads data has died; inside the block of this context.

    Torch raises wherever the main thread is when it hears of that, in the middle of an optimizer's step too. Held back,
    it leaves the run in a state to continue from. Torch must have begun to listen before the block: when the first
    batch is loaded.
    """

    running = heard = False

    def __enter__(self) -> Self:
        handler: Any = None if _CHILD is None else signal.getsignal(_CHILD)
        main = threading.current_thread() is threading.main_thread()
        self._handler: Any = handler if callable(handler) and main else None
        if self._handler is not None:
            signal.signal(_CHILD, self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        # Torch may have put its own handler over it meanwhile.
        if self._handler is not None and signal.getsignal(_CHILD) == self._hear:
            signal.signal(_CHILD, self._handler)

    def tell(self) -> None:
        """Let torch raise for what was held back."""
        self.heard = False
        self._handler(_CHILD, None)

    def _hear(self, *happened: Any) -> None:
        if self.running:
            self.heard = True
        else:
            self._handler(*happened)


@contextmanager
def between_steps() -> Iterator[None]:
    """Hold back, until the block ends, that a process which loads data has died."""
    with Deaths() as deaths:
        deaths.running = True
        yield
        deaths.running = False
        if deaths.heard:
            deaths.tell()


def worker_error(error: BaseException) -> ConservtlError | None:
    """Return the error to raise in the place of torch's for a process that loads data; None for any other error."""
    text = str(error)
    if (died := _DIED.search(text)) is not None:
        pid, by = died[1], died[2]
        how = f"was killed ({by})" if by else "ended"
        return LostWorkerError(
            f"data: the process {pid}, which loads batches, {how}, so training stopped. {_GO_ON}. {_MEMORY}."
        )
    if (raised := _RAISED.match(text)) is None:
        return None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = lines[-1].rstrip(".")[:500]
    if raised[1] == "MemoryError":
        return LostWorkerError(
            f"data: worker {raised[2]}, which loads batches, ran out of memory ({said}), so training "
            f"stopped. {_GO_ON}. Lower training.num_workers, or the size of a batch."
        )
    return DataError(
        f"data: worker {raised[2]}, which loads batches, raised {said}, so training stopped. {_GO_ON}, once the "
        "example can be loaded."
    )


@contextmanager
def named_worker_errors() -> Iterator[None]:
    """Turn torch's errors for processes that load data into one sentence."""
    try:
        yield
    except ConservtlError:
        raise
    except Exception as error:
        named = worker_error(error)
        if named is None:
            raise
        raise named from error
