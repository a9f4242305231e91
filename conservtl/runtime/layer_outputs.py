"""The tensors of a layer's output that are its features."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from conservtl.errors import SpecError

__all__ = ["all_tensors_of", "tensor_of"]


def all_tensors_of(output: Any, layer: str, module: nn.Module | None = None) -> list[Tensor]:
    """Return all parts of a layer's output that are features.

    Of a list (of maps at several resolutions) these are all its tensors. Of a tuple, as of recurrent and transformer
    layers, it is the first, with others of its kind: the same examples, number of dimensions and channels.
    """
    if isinstance(output, list) and output:
        return [tensor for part in output for tensor in all_tensors_of(part, layer)]
    if isinstance(output, tuple) and output and not isinstance(module, (nn.RNNBase, nn.MultiheadAttention)):
        first, *rest = output
        tensors = all_tensors_of(first, layer)
        return tensors + [part for part in rest if len(tensors) == 1 and _alike(part, tensors[0])]
    return [tensor_of(output, layer)]


def _alike(part: Any, first: Tensor) -> bool:
    """Whether a part of a tuple is of the kind of the first: not an attention map, a length or a state."""
    if not isinstance(part, Tensor) or not part.is_floating_point() or part.ndim != first.ndim or first.ndim < 2:
        return False
    same = [part.shape[axis] == first.shape[axis] for axis in ((1, -1) if first.ndim > 3 else (-1,))]
    return len(part) == len(first) and any(same)


def tensor_of(output: Any, layer: str) -> Tensor:
    """Return a layer's output: a tensor, or the first part of a tuple, as of recurrent and transformer layers."""
    while isinstance(output, (tuple, list)) and output:
        output = output[0]
    if not isinstance(output, Tensor):
        raise SpecError(f"layer {layer!r} returns a {type(output).__name__}, no tensor to compare. Tap another layer.")
    return output
