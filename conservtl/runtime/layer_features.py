"""Features of a layer: the tensors of its output, their channel axis, means over positions."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from conservtl.compat import BatchNormBase, ConvBase, InstanceNormBase
from conservtl.errors import SpecError

__all__ = ["Channels", "all_tensors_of", "channel_axis", "output_size", "pooled", "tensor_of"]


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


_SECOND: tuple[type[nn.Module], ...] = (ConvBase, BatchNormBase, InstanceNormBase, nn.GroupNorm)
_SIZES = ("out_features", "out_channels", "num_features", "num_channels", "embedding_dim", "embed_dim", "nf")
_INPUT_SIZES = ("in_features", "in_channels", "num_features", "num_channels", "normalized_shape", "embed_dim", "nx")
_SPATIAL = re.compile(r"[123][dD]$")


class Channels:
    r"""Channel axis of a module's output, found from the sizes that the modules inside it declare.

    Convolutions declare ``out_channels``, linear maps ``out_features``, layer norms ``normalized_shape``, and so on.
    The last of them that declares the size of an axis of the output decides:

    1. If one axis has this size, it holds the channels. Once found, it serves for outputs in which two axes are equal.
    2. If several have it, the module's own convention decides: channels are second in the outputs of convolutions,
       batch, instance and group norms and of norms whose class ends in ``2d``, and last in those of linear maps, layer
       norms and recurrent layers. A ``Permute`` behind it moves them. In a block (no ``nn.Sequential``) whose first
       module takes as many channels as the last gives, the first one's convention decides, because the block adds its
       input: a block of ConvNeXt begins with a convolution, ends with a linear map and has its channels second.
    3. If none has it, the same goes for half of it, which a gated linear unit leaves. Else channels are second if the
       last such module is a convolution for outputs of as many dimensions, and last otherwise.
    """

    def __init__(self, module: nn.Module) -> None:
        self._leaves = list(_leaves(module))
        self._block = not isinstance(module, nn.Sequential)
        self._known: dict[int, int] = {}

    def axis(self, features: Tensor) -> int:
        """Return the channel axis of an output (N, ...)."""
        if features.ndim <= 2:
            return features.ndim - 1
        sizes = tuple(features.shape)
        declared = [(leaf, size) for leaf in self._leaves if (size := output_size(leaf)) is not None]
        for share, (leaf, size) in itertools.product((1, 2), reversed(declared)):
            axes = [axis for axis in range(1, len(sizes)) if sizes[axis] * share == size]
            if len(axes) == 1:
                return self._known.setdefault(features.ndim, axes[0])
            if axes:
                known = self._known.get(features.ndim)
                return known if known in axes else self._by_convention(leaf, size, axes, features.ndim)
        if declared and _dimensions(declared[-1][0]) == features.ndim:
            return 1
        return features.ndim - 1

    def _by_convention(self, leaf: nn.Module, size: int, axes: list[int], ndim: int) -> int:
        """Return the axis among equal ones."""
        first = next((one for one in self._leaves if output_size(one) is not None), leaf)
        moves = [one for one in self._leaves[self._leaves.index(leaf) + 1 :] if _is_permutation(one, ndim)]
        if self._block and first is not leaf and not moves and _input_size(first) == size:
            leaf = first
        axis = 1 if _is_second(leaf, ndim) else ndim - 1
        for move in moves:
            axis = list(move.dims).index(axis)
        return axis if axis in axes else axes[-1]


def channel_axis(module: nn.Module, features: Tensor) -> int:
    """Return the channel axis of a module's output.

    Example:
        >>> import torch
        >>> channel_axis(nn.Conv2d(3, 8, 3), torch.zeros(2, 8, 5, 5))
        1
        >>> channel_axis(nn.Linear(3, 8), torch.zeros(2, 5, 8))
        2
    """
    return Channels(module).axis(features)


def output_size(module: nn.Module) -> int | None:
    """Return the number of channels that a module declares for its output; None if it declares none."""
    if isinstance(module, nn.RNNBase):
        return (module.proj_size or module.hidden_size) * (2 if module.bidirectional else 1)
    return _size(module, (*_SIZES, "normalized_shape"))


def pooled(features: Tensor, axis: int) -> Tensor:
    """Return the means over all positions of features (N, ...), as (N, channels)."""
    return features.movedim(axis, 1).flatten(2).mean(2) if features.ndim > 2 else features


def _leaves(module: nn.Module) -> Iterator[Any]:
    """Yield the modules inside, in order, that have no children; attention as a whole."""
    children = list(module.children())
    if not children or isinstance(module, nn.MultiheadAttention):
        yield module
        return
    for child in children:
        yield from _leaves(child)


def _size(module: nn.Module, names: tuple[str, ...]) -> int | None:
    for name in names:
        size = getattr(module, name, None)
        if isinstance(size, int) and not isinstance(size, bool):
            return size
        if isinstance(size, (tuple, list)) and len(size) and isinstance(size[-1], int):
            return int(size[-1])
    gains = [parameter for parameter in module.parameters(recurse=False) if parameter.ndim == 1]
    return len(gains[0]) if gains and all(p.ndim == 1 for p in module.parameters(recurse=False)) else None


def _input_size(module: nn.Module) -> int | None:
    return module.input_size if isinstance(module, nn.RNNBase) else _size(module, _INPUT_SIZES)


def _dimensions(module: nn.Module) -> int | None:
    """Return the number of dimensions of a convolution's output, None for other modules."""
    return module.weight.ndim if isinstance(module, ConvBase) else None


def _is_second(module: nn.Module, ndim: int) -> bool:
    """Whether channels are the second axis in a module's outputs with ``ndim`` dimensions."""
    dimensions = _dimensions(module)
    if dimensions is not None:
        return dimensions == ndim
    return isinstance(module, _SECOND) or bool(_SPATIAL.search(type(module).__name__))


def _is_permutation(module: Any, ndim: int) -> bool:
    dims = getattr(module, "dims", None)
    return isinstance(dims, (tuple, list)) and sorted(dims) == list(range(ndim))
