"""Weight of each channel of a layer for the task: the rise of the loss if the channel is zeroed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from conservtl.batches import map_tensors, replace_tensors, row_count, tensors_of
from conservtl.errors import SpecError, counted
from conservtl.plan.decision import Measure, MeasureContext
from conservtl.runtime.layer_features import Channels

__all__ = ["AttentionMeasure"]

_ELEMENTS = 1 << 24  # of a layer's repeated output, with another channel zeroed in each copy


class AttentionMeasure(Measure):
    """Softmax, over a layer's channels, of the rise of the task's loss if a channel is zeroed, times their number.

    One pass over the data for each layer, in the model's own precision. The layer's output is repeated for as many
    channels as fit in memory, with another channel zeroed in each copy; the modules behind it see one large batch.
    """

    kind: Literal["attention"] = "attention"
    layers: tuple[str, ...]
    """Layers to measure."""

    def describe(self) -> str:
        """Return one line for the plan's table."""
        return f"rise of the loss with each channel zeroed, at {', '.join(self.layers)}, on {self.data} data"

    def verify(self, found: Mapping[str, Tensor]) -> None:
        """Raise unless there is a vector of weights for each layer."""
        for layer in self.layers:
            shape = tuple(found[layer].shape) if layer in found else None
            if shape is None or len(shape) != 1:
                raise SpecError(
                    f"{self.name!r} must have a vector of channel weights for each of {list(self.layers)}; that of "
                    f"{layer!r} is {'missing' if shape is None else f'of shape {shape}'}. Measure it on this model."
                )

    @torch.no_grad()
    def compute(self, probe: MeasureContext) -> dict[str, Tensor]:
        """Return the attention of each layer, (channels,), 1 on average."""
        rises: dict[str, Tensor] = {}
        count = 0
        for batch in probe.batches:
            size = row_count(batch)
            count += size
            plain = probe.loss(probe.forward(probe.model, batch), batch)
            for layer in self.layers:
                losses = _Occluded(probe, layer).losses(batch, size)
                rises[layer] = rises.get(layer, 0.0) + size * (losses - plain).double()
        return {layer: ((rise / count).softmax(0) * len(rise)).float() for layer, rise in rises.items()}


class _Occluded:
    """Losses of the model with channels of one layer zeroed."""

    def __init__(self, probe: MeasureContext, layer: str) -> None:
        if layer not in probe.modules:
            raise SpecError(f"layer {layer!r} has no module in the source model. Tap layers that both have.")
        self.probe, self.layer = probe, layer
        self.module = probe.modules[layer]
        self.channels = Channels(self.module)

    def losses(self, batch: Any, size: int) -> Tensor:
        """Return the loss with each channel zeroed, (channels,)."""
        shape: list[tuple[int, int]] = []

        def look(output: Tensor) -> Tensor:
            if len(output) != size:  # a part of the examples, as experts see it
                raise self._no_example_a_row(output, size)
            shape.append((output.shape[self.channels.axis(output)], output.numel()))
            return output

        outputs = self._run(batch, look)
        if len(set(shape)) != 1:
            raise SpecError(
                f"layer {self.layer!r} must give one output in eval mode to measure its attention; it gives "
                f"{len(shape)} of different sizes. Tap another layer, or set attention=False."
            )
        channels, elements = shape[0]
        # A scalar such as outputs.loss is the mean over all rows, so that copies cannot be told apart in it.
        whole = any(not tensor.ndim for tensor in tensors_of(outputs))
        at_once = 1 if whole else max(1, min(channels, _ELEMENTS // elements))
        return torch.cat([self._together(batch, size, part) for part in torch.split(torch.arange(channels), at_once)])

    def _together(self, batch: Any, size: int, zeroed: Tensor) -> Tensor:
        """Return the losses of some channels, computed in one pass."""
        copies = len(zeroed)

        def occlude(output: Tensor) -> Tensor:
            if len(output) not in (size, copies * size):
                raise self._no_example_a_row(output, size)
            axis = self.channels.axis(output)
            mask = torch.ones(copies, output.shape[axis], dtype=output.dtype, device=output.device)
            mask[torch.arange(copies), zeroed.to(output.device)] = 0
            wide = [1] * output.ndim
            wide[0], wide[axis] = copies * size, output.shape[axis]
            repeated = output if len(output) == copies * size else _repeat(output, copies)
            return repeated * mask.repeat_interleave(size, 0).view(wide)

        try:
            return self._split(self._run(batch, occlude), batch, size, copies)
        except Exception:  # noqa: BLE001 - a path around the layer may fail in any way: repeat the inputs of the whole model
            wide = map_tensors(batch, lambda tensor: _repeat(tensor, copies) if tensor.ndim else tensor)
            return self._split(self._run(wide, occlude), batch, size, copies)

    def _no_example_a_row(self, output: Tensor, size: int) -> SpecError:
        return SpecError(
            f"layer {self.layer!r} gives outputs of shape {tuple(output.shape)} for {counted(size, 'example')}, so no "
            "channel of an example can be told. Tap another layer, or set attention=False."
        )

    def _split(self, outputs: Any, batch: Any, size: int, copies: int) -> Tensor:
        """Return the loss of each copy."""
        if copies == 1:
            return self.probe.loss(outputs, batch)[None]
        if any(len(tensor) != copies * size for tensor in tensors_of(outputs) if tensor.ndim):
            raise SpecError(f"layer {self.layer!r}: the model's outputs have no example a row. Set attention=False.")
        losses = []
        for copy in range(copies):
            part = slice(copy * size, (copy + 1) * size)
            rows = [tensor[part] if tensor.ndim else tensor for tensor in tensors_of(outputs)]
            losses.append(self.probe.loss(replace_tensors(outputs, rows), batch))
        return torch.stack(losses)

    def _run(self, batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
        """Return the outputs of the model with the layer's output changed."""

        def hook(_: nn.Module, __: Any, output: Any) -> Any:
            return _first_changed(output, change)

        with self.module.register_forward_hook(hook):
            return self.probe.forward(self.probe.model, batch)


def _first_changed(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return a layer's output with its tensor changed; of a tuple (recurrent, transformer layers) the first."""
    if isinstance(output, Tensor):
        return change(output)
    if isinstance(output, list):
        return [_first_changed(part, change) for part in output]
    return (_first_changed(output[0], change), *output[1:])


def _repeat(tensor: Tensor, copies: int) -> Tensor:
    return tensor.repeat(copies, *[1] * (tensor.ndim - 1))
