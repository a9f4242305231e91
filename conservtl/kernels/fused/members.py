"""Parameters of one device and type with their anchors, prepared for programs that act on all of them at once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from operator import attrgetter
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from conservtl.kernels.chunks import dense_gradient
from conservtl.kernels.dtensor import by_rows, local, sharded
from conservtl.kernels.fused.table import Addresses, Blocks
from conservtl.kernels.philox import DRAWN

__all__ = ["BLOCK", "SPAN", "TYPES", "Members", "alike", "fits", "in_rows"]

BLOCK = 2048
"""Elements that a program handles at once. It is a multiple of 16, so that a block begins where a word does."""
SPAN = 8
"""Blocks over which a program sums."""
TYPES: dict[torch.dtype, Any] = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}
"""Triton's names of the types that programs act on."""
_gradient_of = attrgetter("grad")


class Members:
    """Parameters of one device and type, with anchors of one type or none; valid while their memory stays.

    Args:
        parameters: the trained tensors, sharded or not.
        anchors: tensors laid out alike; None: the parameters are used without anchors.
        importances: weight of each element, laid out alike; None: 1.
    """

    def __init__(
        self, parameters: Sequence[Any], anchors: Sequence[Any] | None = None, importances: Sequence[Any] | None = None
    ) -> None:
        self.owners = list(parameters)
        self.weights: list[Tensor] = [local(parameter).detach() for parameter in parameters]
        self.anchors: list[Tensor] | None = None if anchors is None else [local(anchor) for anchor in anchors]
        self.importances: list[Tensor] | None = None if importances is None else [local(one) for one in importances]
        self.device, self.dtype = self.weights[0].device, self.weights[0].dtype
        types = [one[0].dtype if one else self.dtype for one in (self.weights, self.anchors, self.importances)]
        self.accumulate = torch.float64 if torch.float64 in types else torch.float32
        self.types = tuple(TYPES[dtype] for dtype in types)
        """Triton's types of weights, anchors and importances."""
        self.accumulated = TYPES[self.accumulate]
        self._contiguous = all(weight.is_contiguous() for weight in self.weights)
        self._strides = [weight.stride() for weight in self.weights]  # of gradients that were found to be alike
        self._plain = not any(map(sharded, parameters))
        self.sizes = [weight.numel() for weight in self.weights]
        fixed = [Addresses(self.device) for _ in range(3)]
        self.weight_table = fixed[0].to(self.weights)
        self.anchor_table = self.weight_table if self.anchors is None else fixed[1].to(self.anchors)
        self.importance_table = self.weight_table if self.importances is None else fixed[2].to(self.importances)
        self.aligned = all(one.aligned for one in fixed)
        self._addresses = Addresses(self.device)

    @property
    def anchored(self) -> bool:
        """Whether the parameters have anchors."""
        return self.anchors is not None

    @cached_property
    def blocks(self) -> Blocks:
        """A block of elements for each program."""
        return Blocks(self.sizes, BLOCK, self.device)

    @cached_property
    def spans(self) -> Blocks:
        """A span of elements for each program."""
        return Blocks(self.sizes, BLOCK * SPAN, self.device)

    @cached_property
    def drawn(self) -> Blocks:
        """Elements whose masks are drawn together for each program."""
        return Blocks(self.sizes, DRAWN, self.device)

    def gradients(self, *, made: bool, which: Sequence[bool] | None = None) -> tuple[Tensor, bool]:
        """Return the addresses of the gradients, and whether all tensors can be read in words of 16 bytes.

        Sparse gradients become dense, and those laid out otherwise than their parameters are copied.

        Args:
            made: whether missing gradients become zeros; else their address is 0.
            which: whether a gradient is wanted; if not its address is 0. None: all are.
        """
        found = list(map(_gradient_of, self.owners))
        try:
            quick = self._plain and self._alike(found)
            addresses = list(map(torch.Tensor.data_ptr, found)) if quick else []
        except (TypeError, RuntimeError):  # one is missing, or sparse
            quick = False
        if not quick:
            found = [self._laid_out(at, made=made) for at in range(len(self.owners))]
            if self._plain and None not in found:
                self._strides = list(map(torch.Tensor.stride, found))
            addresses = [0 if one is None else one.data_ptr() for one in found]
        if which is not None:
            addresses = [address if wanted else 0 for address, wanted in zip(addresses, which, strict=True)]
        table = self._addresses.at(addresses)
        return table, self.aligned and self._addresses.aligned

    def _alike(self, gradients: Sequence[Tensor]) -> bool:
        """Whether gradients are laid out as their parameters, or as others that were."""
        if self._contiguous:
            return all(map(torch.Tensor.is_contiguous, gradients))
        return list(map(torch.Tensor.stride, gradients)) == self._strides

    def _laid_out(self, at: int, *, made: bool) -> Tensor | None:
        owner = self.owners[at]
        if owner.grad is None and not made:
            return None
        gradient = dense_gradient(owner)
        part: Tensor = local(gradient)
        if not alike(part, self.weights[at]):
            owner.grad = torch.empty_like(owner).copy_(gradient)
            part = local(owner.grad)
        return part


def fits(parameter: Any, anchor: Any = None, importance: Any = None) -> bool:
    """Whether programs can act on a parameter: real, dense, of its gradient's type, with the others laid out alike."""
    weight: Tensor = local(parameter)
    if weight.dtype not in TYPES or not _dense(weight):
        return False
    if getattr(parameter, "grad_dtype", weight.dtype) != weight.dtype:  # None: of any type
        return False
    if sharded(parameter) and not by_rows(parameter):
        return False
    others = [local(one) for one in (anchor, importance) if one is not None]
    return all(
        one.device == weight.device and one.dtype in TYPES and one.shape == weight.shape and alike(one, weight)
        for one in others
    )


def alike(tensor: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape have their elements at the same places in memory."""
    if tensor.stride() == other.stride() or not tensor.numel():
        return True
    places = zip(tensor.shape, tensor.stride(), other.stride(), strict=True)
    return all(one == two for size, one, two in places if size > 1)


def in_rows(weight: Tensor) -> bool:
    """Whether the rows of a dense tensor follow each other in memory."""
    return weight.ndim < 2 or weight.shape[0] == 1 or weight.stride(0) * weight.shape[0] == weight.numel()


def _dense(tensor: Tensor) -> bool:
    """Whether a tensor's elements fill their memory without gaps, in any order."""
    if not tensor.numel():
        return True
    expected = 1
    for size, stride in sorted((z for z in zip(tensor.shape, tensor.stride(), strict=True) if z[0] > 1), key=_stride):
        if stride != expected:
            return False
        expected *= size
    return True


def _stride(dim: tuple[int, int]) -> int:
    return dim[1]
