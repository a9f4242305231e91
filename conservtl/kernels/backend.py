"""The backend of a device: programs over all tensors at once on CUDA, buffers of a cache's size on the CPU."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

import torch

from conservtl.kernels.dtensor import local
from conservtl.plan.update import Moving, Prepared

if TYPE_CHECKING:
    from conservtl.kernels.fused.moves import Moves

__all__ = ["capturing", "fused_on", "split"]


def capturing() -> bool:
    """Whether the caller captures a CUDA graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()  # type: ignore[no-untyped-call]


def fused_on(device: torch.device) -> bool:
    """Whether Triton programs act on all tensors of a device at once; else torch's operations on lists of tensors do.

    Triton comes with torch on Linux. ``CONSERVTL_TRITON=0`` in the environment does without it. With Triton's
    interpreter (``TRITON_INTERPRET=1``) and ``CONSERVTL_TRITON=1``, the programs act on CPU tensors too: for tests.
    """
    if device.type == "cuda":
        return _available()
    return device.type == "cpu" and _interpreted()


def split(
    moving: Sequence[Moving], *, rows: bool = False, new: bool = True, short: bool = False
) -> tuple[Moves | None, Sequence[Moving]]:
    """Return the parameters of an update that programs act on at once, and the rest.

    Args:
        moving: the parameters; prepared once if the list is kept from step to step.
        rows: whether rows are acted on.
        new: whether parameters with rows of new labels can be acted on as others.
        short: whether no row may be so long that several programs share it.
    """
    if not isinstance(moving, Prepared):
        return None, moving
    key = (rows, new, short)
    if key not in moving.kept:
        if any(fused_on(local(item.parameter).device) for item in moving):
            from conservtl.kernels.fused.moves import moves_of

            moving.kept[key] = moves_of(moving, rows=rows, new=new, short=short)
        else:
            moving.kept[key] = None
    found: tuple[Moves | None, Sequence[Moving]] | None = moving.kept[key]
    return (None, moving) if found is None else found


@cache
def _available() -> bool:
    return os.environ.get("CONSERVTL_TRITON") != "0" and importlib.util.find_spec("triton") is not None


@cache
def _interpreted() -> bool:
    return os.environ.get("CONSERVTL_TRITON") == "1" and os.environ.get("TRITON_INTERPRET") == "1" and _available()
