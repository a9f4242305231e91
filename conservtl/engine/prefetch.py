"""Batches copied to a GPU one ahead, on a stream of their own, while the one before is computed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Generic, TypeVar

import torch

__all__ = ["Ahead", "ahead"]

Content = TypeVar("Content")
Moved = TypeVar("Moved")


def ahead(
    contents: Iterator[Content], move: Callable[[Content], Moved], device: torch.device
) -> Iterator[Callable[[], Moved]]:
    """Return functions that return moved batches; on a GPU the next one's copy begins before it is asked for.

    The host does not wait for copies of pinned batches.
    """
    if device.type != "cuda":
        return (partial(move, content) for content in contents)
    return Ahead(contents, move, Side(device))


class Side:
    """A stream beside the current one of a GPU.

    A copy begins when the work that the current stream was given before is done. So the memory of an earlier batch may
    be used again, and nothing needs to know the tensors in a batch, which may hide in objects that move themselves.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def run(self, copy: Callable[[], Any]) -> tuple[Any, Any]:
        """Return the result of a copy on this stream, and a mark of its end."""
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            result = copy()
        return result, self._stream.record_event()

    def join(self, mark: Any) -> None:
        """Let the current stream wait for a copy; the host goes on."""
        torch.cuda.current_stream(self.device).wait_event(mark)


class Ahead(Generic[Content, Moved]):
    """Iterator over functions that return batches, of which at most one is copied before it is asked for."""

    def __init__(self, contents: Iterator[Content], move: Callable[[Content], Moved], side: Any) -> None:
        self._contents, self._move, self._side = contents, move, side
        self._waiting: deque[_Copy] = deque()

    def __iter__(self) -> Iterator[Callable[[], Moved]]:
        return self

    def __next__(self) -> Callable[[], Moved]:
        content = next(self._contents)
        copy = _Copy(partial(self._move, content))
        self._waiting.append(copy)
        self._begin()
        return partial(self._take, copy)

    def _begin(self) -> None:
        """Begin the copy of the next batch."""
        if self._waiting and not self._waiting[0].begun:
            self._waiting[0].begin(self._side)

    def _take(self, copy: _Copy) -> Moved:
        if not copy.begun:
            copy.begin(self._side)
        self._waiting.remove(copy)
        self._side.join(copy.mark)
        result: Moved = copy.result
        self._begin()
        return result


class _Copy:
    """A batch that is copied, or will be; the host's batch is dropped once the copy has begun."""

    begun = False

    def __init__(self, copy: Callable[[], Any]) -> None:
        self._copy = copy

    def begin(self, side: Any) -> None:
        """Begin the copy."""
        self.result, self.mark = side.run(self._copy)
        self.begun = True
        del self._copy
