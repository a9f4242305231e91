"""Calls of programs: compiled once, and then launched without the work that Triton does to find what it compiled."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from ctypes import c_float
from typing import Any

import torch
from torch import Tensor

from conservtl.kernels.fused.table import keep

__all__ = ["call", "parted"]

_compiled: dict[Any, Any] = {}
"""Program, device, and all by which Triton distinguishes what it compiles -> the compiled program; False where it
takes other arguments than the program."""


def call(
    program: Any, grid: Sequence[int], tensors: Sequence[Tensor], numbers: Sequence[float], constants: Sequence[Any]
) -> None:
    """Launch a program on the device of its tensors.

    Triton finds a compiled program by the types and the alignment of all arguments, in a time that is a good part of a
    step on small networks. Here the few properties that can change are compared.

    The program takes tensors, numbers of the host and constants that are compiled in, in this order.
    """
    device = tensors[0].device
    arguments = (*tensors, *numbers, *constants)
    if device.type != "cuda" or torch.version.hip is not None:  # on AMD's devices it also depends on tensors' sizes
        with _on(device):
            program[tuple(grid)](*arguments)
        return
    keep(tensors)
    pointers = tuple([(tensor.dtype, tensor.data_ptr() % 16 == 0) for tensor in tensors])
    key = (id(program), device.index, constants, pointers, *map(_kind, numbers))
    with _on(device):
        if compiled := _compiled.get(key):
            try:
                compiled[(*grid, 1, 1)[:3]](*arguments)
            except (AttributeError, TypeError):  # arguments are read before anything is launched
                _compiled[key] = False  # as before Triton 3.3, which leaves out the constants
            else:
                return
        found = program[tuple(grid)](*arguments)
        _compiled.setdefault(key, found)


def parted(number: float) -> tuple[float, float]:
    """Return two numbers whose sum is this one, to 48 bits, if each is rounded to single precision."""
    high = c_float(number).value
    return high, number - high


def _kind(number: float) -> Any:
    """Return the properties of a number by which Triton compiles differently: float, or width, 1 and divisibility."""
    if isinstance(number, float):
        return None
    return number == 1, number % 16 == 0, -(1 << 31) <= number < 1 << 31, number < 1 << 63


def _on(device: torch.device) -> Any:
    """Return a context in which a device is the current one."""
    if device.type != "cuda" or torch.cuda.current_device() == device.index:
        return nullcontext()
    return torch.cuda.device(device)
