"""The quadratic pull on all parameters of a device at once, by one program."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from conservtl.kernels.chunks import Pulled
from conservtl.kernels.fused.launch import add_pull, lerp
from conservtl.kernels.fused.members import Members
from conservtl.kernels.fused.rates import Rates
from conservtl.kernels.fused.stream import AnchorStream, streams

__all__ = ["FusedPull"]


class FusedPull:
    """Parameters of one device and type that are pulled together, whatever their strengths and rates.

    All have anchors of one type and device, or none has one, and so for importances.
    """

    def __init__(self, items: Sequence[Pulled]) -> None:
        first, parameters = items[0], [item.parameter for item in items]
        anchors = None if first.anchor is None else [item.anchor for item in items if item.anchor is not None]
        importances = None if first.importance is None else [item.importance for item in items]
        streamed = anchors is not None and streams(first)
        self._members = Members(parameters, None if streamed else anchors, importances)
        self._stream = AnchorStream(self._members, anchors) if streamed and anchors else None
        self._every = first.every
        self._rates = Rates([item.group for item in items], [item.strength for item in items], self._members.device)

    def add_gradients(self, factor: float = 1.0, scale: Tensor | None = None) -> None:
        """Add factor × scale × strength × importance × (w - anchor) to each gradient, as ``Pull`` does."""
        if factor:
            add_pull(self._members, self._rates.without(factor * self._every), scale, self._stream)

    def move_weights(self, factor: float = 1.0, skip: Tensor | None = None) -> None:
        """Move each weight by rate × factor × strength × (anchor - w), as ``Pull`` does."""
        if factor and self._rates.groups:
            lerp(self._members, self._rates.times(factor), skip, self._every, self._stream)
