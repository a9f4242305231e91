"""Whether a part of a model is computed again, for the backward pass."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

__all__ = ["contexts", "is_recomputing"]

_state = threading.local()  # a GPU's backward pass has a thread of its own


def is_recomputing() -> bool:
    """Return whether this thread computes activations of a checkpoint again, which hooks are not to count."""
    return getattr(_state, "active", False)


def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return the contexts of the forward pass and of its repetition, as ``context_fn`` of torch's ``checkpoint``."""
    return nullcontext(), _again()


@contextmanager
def _again() -> Iterator[None]:
    before = is_recomputing()
    _state.active = True
    try:
        yield
    finally:
        _state.active = before
