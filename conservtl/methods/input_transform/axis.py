"""The axis of a model's input that holds features, and their number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from conservtl.batches import tensors_of
from conservtl.errors import SpecError
from conservtl.layers import Layer
from conservtl.layers.names import named_modules
from conservtl.padding import find_padding

__all__ = ["feature_axis", "feature_count"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def feature_axis(example: Any, dim: int | None) -> int:
    """Return the axis of the features.

    Raises:
        SpecError: it is that of the positions, whose number differs from batch to batch.
    """
    padding = find_padding(example) if isinstance(example, Mapping) else None
    first = next(iter(tensors_of(example)), None)
    if padding is None or first is None:
        return 1 if dim is None else dim
    dim = -1 if dim is None else dim
    if first.ndim == 2 or dim % first.ndim == 1:
        fix = "Choose dim=-1" if first.ndim > 2 else "Take features instead of samples, or leave InputTransform out"
        raise SpecError(
            f"InputTransform: dim={dim} must be an axis of features; of inputs {tuple(first.shape)} with lengths it is "
            f"that of positions, whose number differs from batch to batch. {fix}."
        )
    return dim


def feature_count(model: nn.Module, layers: Sequence[Layer], example: Any, dim: int) -> int:
    """Return the length of the axis, from an example or else from the first weight."""
    if example is not None:
        first = next(iter(tensors_of(example)), None)
        if first is None or not first.is_floating_point() or not -first.ndim < dim < first.ndim:
            seen = "no tensor" if first is None else f"a tensor of shape {tuple(first.shape)}, {first.dtype}"
            raise SpecError(
                f"InputTransform: dim={dim} must be an axis behind the batch of an input of real numbers; the example "
                f"holds {seen}. Choose another dim."
            )
        return first.shape[dim]
    modules = named_modules(model)
    names = [info.name for info in layers[0].parameters if info.kind == "weight"]
    module = modules.get(names[0].rpartition(".")[0]) if names else None
    if isinstance(module, _CONVOLUTIONS) and dim in (1, -1 - len(module.kernel_size)):
        return module.in_channels
    if isinstance(module, nn.Linear):
        return module.in_features
    if isinstance(module, nn.RNNBase) and dim == -1:
        return module.input_size
    raise SpecError(
        f"InputTransform: the length of the input's axis {dim} cannot be told from layer {layers[0].name!r}. Pass "
        "adapt(..., example=a batch of inputs)."
    )
