"""The padding of a forward pass, from the arguments that the model was called with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from conservtl.labels import argument_names
from conservtl.layers import unwrap
from conservtl.padding import Padding, Resampling, completed, find_padding, names_padding
from conservtl.runtime.model_hooks import remove_hooks

__all__ = ["PaddingWatch"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)


class PaddingWatch:
    """Finds the padding of each forward pass of a model while it is open.

    Modules that change the number of positions (convolutions and pooling with strides) are recorded only if the
    arguments say what is padding.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = unwrap(model)
        self._names = argument_names(self._model)
        self._found: Padding | None = None
        self._resamplings: list[Resampling] = []
        self._handles: list[RemovableHandle] = []

    @property
    def padding(self) -> Padding | None:
        """The padding of the last forward pass, at all positions reached so far; None: nothing says what is padding."""
        return None if self._found is None else replace(self._found, resamplings=tuple(self._resamplings))

    def padding_of(self, batch: Any) -> Padding | None:
        """Return the padding of the last forward pass, or that which a dictionary of a batch says."""
        return completed(self.padding, batch)

    def __enter__(self) -> Self:
        self.close()
        self._handles = [self._model.register_forward_pre_hook(self._called, with_kwargs=True)]
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def begin(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Begin a forward pass with these arguments."""
        self._resamplings.clear()
        arguments = _arguments(self._names, args, kwargs)
        self._found = find_padding(arguments, self._names) if names_padding((*self._names, *arguments)) else None
        if self._found is not None and len(self._handles) < 2:
            modules = [module for module in self._model.modules() if isinstance(module, (*_CONVOLUTIONS, *_POOLS))]
            self._handles += [module.register_forward_hook(self._ran) for module in modules]

    def close(self) -> None:
        """Remove the hooks."""
        remove_hooks(self._handles)

    def _called(self, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.begin(args, kwargs)

    def _ran(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if not inputs or not isinstance(output, Tensor) or not isinstance(inputs[0], Tensor):
            return
        axes = _axes(module)
        sizes = tuple(zip(inputs[0].shape[-axes:], output.shape[-axes:], strict=True))
        if any(before != after for before, after in sizes):
            self._resamplings.append(
                Resampling(sizes, tuple(partial(_length, _arithmetic(module, axis)) for axis in range(axes)))
            )


def _arguments(names: tuple[str, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return name -> argument; a named tuple or a dictionary among them is replaced by its fields."""
    found: dict[str, Any] = {}
    for name, value in (*zip(names, args, strict=False), *kwargs.items()):
        if isinstance(value, tuple) and hasattr(value, "_asdict"):
            found |= value._asdict()
        elif isinstance(value, Mapping):
            found |= {str(key): part for key, part in value.items()}
        else:
            found[name] = value
    return found


def _axes(module: nn.Module) -> int:
    """Return the number of spatial axes of a convolution or a pooling."""
    classes = enumerate(zip(_CONVOLUTIONS, _POOLS[:3], _POOLS[3:], strict=True), 1)
    return next(axes for axes, kinds in classes if isinstance(module, kinds))


def _arithmetic(module: Any, axis: int) -> tuple[int, int, int, int, bool]:
    """Return kernel, stride, padding, dilation on an axis, and whether incomplete windows count."""

    def of(value: Any) -> int:
        return int(value[axis] if isinstance(value, tuple) else value)

    padding = 0 if isinstance(module.padding, str) else of(module.padding)
    stride = module.kernel_size if module.stride is None else module.stride
    dilation = of(getattr(module, "dilation", 1))
    return of(module.kernel_size), of(stride), padding, dilation, bool(getattr(module, "ceil_mode", False))


def _length(arithmetic: tuple[int, int, int, int, bool], lengths: Tensor) -> Tensor:
    """Return the number of windows over each length."""
    kernel, stride, padding, dilation, up = arithmetic
    span = lengths + 2 * padding - dilation * (kernel - 1) - 1
    return torch.div(span + (stride - 1 if up else 0), stride, rounding_mode="floor") + 1
