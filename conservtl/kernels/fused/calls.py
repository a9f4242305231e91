"""Calls of programs: compiled once, and then launched without the work that Triton does to find what it compiled."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from contextlib import nullcontext
from ctypes import c_float
from functools import cache
from typing import Any

import torch
from torch import Tensor

__all__ = ["call", "parted"]

_compiled: dict[Any, Any] = {}
"""Program, device, and all by which Triton distinguishes what it compiles -> the compiled program."""


def call(
    program: Any, grid: Sequence[int], tensors: Sequence[Tensor], numbers: Sequence[float], constants: Sequence[Any]
) -> None:
    """Launch a program on the device of its tensors.

    Triton finds a compiled program by the types and the alignment of all arguments, in a time that is a good part of a
    step on small networks. Here the few properties that can change are compared.

    Args:
        program: its arguments are tensors, numbers and constants, in this order.
        grid: number of programs in each of up to three dimensions.
        tensors: on one device.
        numbers: of the host, which may differ from call to call.
        constants: arguments that are compiled in.
    """
    device = tensors[0].device
    arguments = (*tensors, *numbers, *constants)
    if device.type != "cuda" or not _launches_itself():
        with _on(device):
            program[tuple(grid)](*arguments)
        return
    pointers = tuple([(tensor.dtype, tensor.data_ptr() % 16 == 0) for tensor in tensors])
    key = (id(program), device.index, constants, pointers, *map(_kind, numbers))
    compiled = _compiled.get(key)
    with _on(device):
        if compiled is None:
            _compiled[key] = program[tuple(grid)](*arguments)
        else:
            compiled[(*grid, 1, 1)[:3]](*arguments)


def parted(number: float) -> tuple[float, float]:
    """Return two numbers whose sum is this one, to 48 bits, if each is rounded to single precision."""
    high = c_float(number).value
    return high, number - high


def _kind(number: float) -> Any:
    """Return the properties of a number by which Triton compiles differently: float, or width, 1 and divisibility."""
    if isinstance(number, float):
        return None
    return number == 1, number % 16 == 0, -(1 << 31) <= number < 1 << 31, number < 1 << 63


@cache
def _launches_itself() -> bool:
    """Whether a compiled program takes the arguments of the program: since Triton 3.3, on NVIDIA's devices."""
    version = importlib.metadata.version("triton").split(".")
    return torch.version.hip is None and (int(version[0]), int(version[1])) >= (3, 3)


def _on(device: torch.device) -> Any:
    """Return a context in which a device is the current one."""
    if device.type != "cuda" or torch.cuda.current_device() == device.index:
        return nullcontext()
    return torch.cuda.device(device)
