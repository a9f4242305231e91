"""Parameters of which each process holds a part (FSDP2): the part, the whole, and numbers over all parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["by_rows", "local", "over_parts", "place_like", "sharded", "whole"]


def sharded(tensor: Any) -> bool:
    """Whether each process holds a part of the tensor only."""
    return hasattr(tensor, "placements")


def local(tensor: Any) -> Any:
    """This process's part of a sharded tensor, on the same memory; any other as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor: Any) -> Tensor:
    """The tensor itself, gathered from all processes where it is sharded, which all of them then must call."""
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full


def by_rows(tensor: Any) -> bool:
    """Whether a sharded tensor is cut along its first dimension and no other, so that each row lies in one process."""
    return all(placement.is_replicate() or placement.is_shard(0) for placement in tensor.placements)


def over_parts(values: Tensor, parameters: Sequence[Any], *, largest: bool = False) -> Tensor:
    """Sums over all parts of a parameter, from the sum over this process's part; all processes call it together.

    Args:
        values: one number a parameter, (parameters,), found on this process's parts.
        parameters: what they were found on; the number of one that is not sharded stays as it is.
        largest: the largest instead of the sum.
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
    """The tensor on the parameter's device, laid out and sharded as it is; every process has the whole, so none sends.

    Args:
        tensor: whole, on any device.
        parameter: what to be like.
        dtype: other than the parameter's.
    """
    tensor = tensor.to(parameter.device, dtype or parameter.dtype)
    if not sharded(parameter):
        if tensor.stride() != parameter.stride():  # a kernel for many tensors takes only what is laid out alike
            return torch.empty_like(parameter, dtype=tensor.dtype, requires_grad=False).copy_(tensor)
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)
