"""Pulls on CUDA without Triton: operations on lists of tensors, replayed from a graph once they repeat."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any, Protocol

import torch
from torch import Tensor

from conservtl.kernels.chunks import Pulled
from conservtl.kernels.dtensor import sharded
from conservtl.plan.penalty import PenaltyKernel

__all__ = ["Replayed", "capture"]

_ALIKE = 3
"""Steps that must be alike before they are captured."""
_gradient_of = attrgetter("grad")


class Graph(Protocol):
    """Captured work on a GPU."""

    def replay(self) -> None:
        """Do the work again, in the memory that it was captured with."""


def capture(work: Callable[[], None], device: torch.device) -> Graph:
    """Return the graph of some work, which is captured and not done. The host waits for the device this once."""
    graph: Any = torch.cuda.CUDAGraph()
    streams: Any = torch.cuda
    before = streams.current_stream(device)
    with torch.cuda.device(device):  # torch's own stream for captures is on the first device that captured
        try:
            with torch.cuda.graph(graph, stream=streams.Stream(device), capture_error_mode="thread_local"):
                work()
        finally:
            torch.cuda.set_stream(before)  # which torch leaves out if the capture fails
    captured: Graph = graph
    return captured


class Replayed:
    """A pull whose launches are captured in a CUDA graph, and replayed as long as nothing it depends on changes.

    A graph holds the addresses of the gradients and the numbers of a step: factor, rate, loss scale. If three steps in
    a row are alike, the next is captured; a step that differs is made by the pull itself. So a rate or a strength that
    changes in each step, and gradients that are missing, sparse or elsewhere in each step, are never captured. Anchors
    on the CPU and sharded parameters are not either, nor is anything after a capture has failed, which a warning says.
    In a graph that the caller captures, the pull takes part itself. The graph keeps memory for the differences.
    """

    def __init__(
        self,
        pull: PenaltyKernel,
        items: Sequence[Pulled],
        capturing: Callable[[Callable[[], None], torch.device], Graph] = capture,
    ) -> None:
        self._pull, self._capturing = pull, capturing
        self._parameters = [item.parameter for item in items]
        self._group, self._device = items[0].group, items[0].parameter.device
        away = any(item.anchor is not None and item.anchor.device != item.parameter.device for item in items)
        self._able = not away and not any(map(sharded, self._parameters))
        self._graph: tuple[Any, Graph] | None = None
        self._seen: tuple[Any, int] = (None, 0)

    def add_gradients(self, factor: float = 1.0, scale: Tensor | None = None) -> None:
        """Add factor × scale × strength × (w - anchor) to each gradient."""
        places = self._gradients() if self._beside(scale) else None
        key = None if places is None else (places, factor, _place(scale))
        self._do(key, lambda: self._pull.add_gradients(factor, scale))

    def move_weights(self, factor: float = 1.0, skip: Tensor | None = None) -> None:
        """Move each weight by rate × factor × strength × (anchor - w)."""
        rate = 0.0 if self._group is None else self._group["lr"]
        changing = _place(rate) if isinstance(rate, Tensor) else rate
        key = (factor, changing, _place(skip)) if self._beside(rate, skip) else None
        self._do(key, lambda: self._pull.move_weights(factor, skip))

    def _do(self, key: Any, work: Callable[[], None]) -> None:
        """Do some work by the graph of the same key, if there is one or it is time to capture one."""
        if self._device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            work()
            return
        if self._graph is not None and key is not None and self._graph[0] == key:
            self._graph[1].replay()
            return
        self._seen = key, self._seen[1] + 1 if key == self._seen[0] else 1
        if key is None or not self._able or self._seen[1] <= _ALIKE:
            work()
            return
        try:
            self._graph = key, self._capturing(work, self._device)
        except RuntimeError as error:  # captured work is not done: nothing has changed
            self._able, self._graph = False, None
            why = str(error).partition("\n")[0].rstrip(".")
            said = f"a pull could not be captured in a CUDA graph ({why}); it goes on without, and takes longer. "
            warnings.warn(said + "Install Triton, which needs no graph.", stacklevel=2)
            work()
            return
        self._graph[1].replay()

    def _beside(self, *numbers: Any) -> bool:
        """Whether scalars are numbers or on the device: a graph would hold the value of one in the host's memory."""
        return all(not isinstance(one, Tensor) or one.device == self._device for one in numbers)

    def _gradients(self) -> list[Any] | None:
        """Return addresses and strides of all gradients; None if one is missing, sparse or still to be laid out."""
        found = list(map(_gradient_of, self._parameters))
        try:
            if list(map(Tensor.stride, found)) != list(map(Tensor.stride, self._parameters)):
                return None
            return list(map(Tensor.data_ptr, found))
        except (TypeError, RuntimeError):
            return None


def _place(tensor: Tensor | None) -> Any:
    return None if tensor is None else (tensor.device, tensor.data_ptr(), tensor.dtype)
