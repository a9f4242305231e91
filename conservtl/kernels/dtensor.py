"""Sharded parameters (FSDP2): this process's part, the whole tensor, and reductions over all parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["by_rows", "from_part", "local", "over_parts", "part_of", "place_like", "real_parts", "sharded", "whole"]


def sharded(tensor: Any) -> bool:
    """Whether each process holds only a part of the tensor."""
    return hasattr(tensor, "placements")


def local(tensor: Any) -> Any:
    """Return this process's part of a sharded tensor, in the same memory; any other tensor unchanged."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def real_parts(tensor: Tensor) -> Tensor:
    """Return a complex tensor's real and imaginary parts, (..., 2), on the same memory; any other tensor as it is.

    A complex parameter is two real ones to every penalty and update: norms, thresholds and products are over the parts.
    """
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def whole(tensor: Any) -> Tensor:
    """Return the whole tensor. If it is sharded, all processes call this together."""
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full


def by_rows(tensor: Any) -> bool:
    """Whether a sharded tensor is cut along its first dimension only, so that each row is in one process."""
    return all(placement.is_replicate() or placement.is_shard(0) for placement in tensor.placements)


def over_parts(values: Tensor, parameters: Sequence[Any], *, largest: bool = False) -> Tensor:
    """Return sums over all parts of each parameter, or the ``largest``, given those over this process's part.

    All processes call it. Numbers of parameters that are not sharded stay.
    """
    alike: dict[Any, list[int]] = {}
    for at, parameter in enumerate(parameters):
        if sharded(parameter):
            alike.setdefault((parameter.device_mesh, tuple(parameter.placements)), []).append(at)
    for (mesh, placements), places in alike.items():
        numbers = values[places].contiguous()
        for dim, placement in enumerate(placements):
            if placement.is_shard():
                op = torch.distributed.ReduceOp.MAX if largest else torch.distributed.ReduceOp.SUM
                torch.distributed.all_reduce(numbers, op, group=mesh.get_group(dim))
        values = values.index_copy(0, torch.tensor(places, device=values.device), numbers)
    return values


def place_like(tensor: Tensor, parameter: Any, dtype: torch.dtype | None = None) -> Tensor:
    """Return a whole tensor with a parameter's device, memory format and sharding. Processes exchange nothing."""
    if dtype is None or parameter.is_complex():  # half precision has no complex numbers
        dtype = parameter.dtype
    tensor = tensor.to(parameter.device, dtype)
    if not sharded(parameter):
        if tensor.stride() != parameter.stride():  # a kernel for many tensors requires equal strides
            return torch.empty_like(parameter, dtype=tensor.dtype, requires_grad=False).copy_(tensor)
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)


def part_of(tensor: Tensor) -> Tensor:
    """Return a copy on the CPU of this process's part of a tensor; of the whole if it is not sharded."""
    part: Tensor = local(tensor.detach()).to("cpu", copy=True)
    return part


def from_part(part: Tensor, parameter: Any, dtype: torch.dtype | None = None) -> Tensor:
    """Return the tensor of which every process has such a part (``part_of``), placed like a parameter."""
    if not sharded(parameter):
        return place_like(part, parameter, dtype)
    from torch.distributed.tensor import DTensor

    moved = part.to(parameter.device, parameter.dtype if dtype is None or parameter.is_complex() else dtype)
    cut: Tensor = DTensor.from_local(
        moved,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
    return cut
