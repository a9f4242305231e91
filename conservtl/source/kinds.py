"""Kinds of tensors that hold no ordinary values: refused in a model and in a source, each with its remedy."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from conservtl.errors import SourceError, SpecError
from conservtl.layers import canonical, unwrap

__all__ = ["check_kinds", "check_model_kinds", "has_values"]

_QUANTISED = ("torch.ao.nn.quantized", "torch.nn.quantized", "torch.ao.nn.intrinsic.quantized")
_UNQUANTISED = ("FloatFunctional", "FXFloatFunctional")  # in the same package: additions with an observer
_SMALL_INTEGERS = (torch.int8, torch.uint8)


def check_kinds(tensors: Mapping[str, Tensor], model: Mapping[str, Tensor], where: str) -> None:
    """Raise unless a source's tensors can be copied into a model's.

    Raises:
        SourceError: a tensor is quantised, of integers or complex where the model's is not, meta, sparse or nested.
    """
    for name, tensor in tensors.items():
        if name not in model:
            continue
        kind = _kind(tensor) or _other_type(tensor, model[name])
        if kind is not None:
            raise SourceError(f"{where}: {name!r} must hold values that can be copied; it {kind[0]}. {kind[1]}")


def check_model_kinds(model: nn.Module, what: str = "the model") -> None:
    """Raise unless a model's parameters and buffers hold ordinary values.

    Raises:
        SpecError: a tensor is quantised, lazy, meta, sparse or nested, or a module is quantised.
    """
    inner = unwrap(model)
    for name, module in inner.named_modules():
        kind = type(module)
        if kind.__module__.startswith(_QUANTISED) and kind.__name__ not in _UNQUANTISED:
            raise SpecError(
                f"{what}: weights must be floating-point parameters; {canonical(name)!r} is a quantised "
                f"{kind.__name__}. Adapt the model before it is quantised, and quantise the result."
            )
    for name, tensor in (*inner.named_parameters(), *inner.named_buffers()):
        found = _kind(tensor)
        if found is None and isinstance(tensor, nn.Parameter) and tensor.dtype in _SMALL_INTEGERS:
            found = _quantised(tensor)
        if found is not None:
            raise SpecError(f"{what}: tensors must hold ordinary values; {canonical(name)!r} {found[0]}. {found[1]}")


def has_values(tensor: Tensor) -> bool:
    """Return whether a tensor holds ordinary values, that arithmetic takes."""
    return _kind(tensor) is None


def _kind(tensor: Tensor) -> tuple[str, str] | None:
    """Return what a tensor is and the remedy, or None for an ordinary one."""
    if is_lazy(tensor):
        return "has no shape yet (a lazy module)", "Run the model once on a batch first."
    if tensor.is_nested:
        return "is a nested tensor", "Make it an ordinary tensor, with torch.nested.to_padded_tensor."
    if tensor.is_quantized or type(tensor).__module__.startswith("torchao"):
        return _quantised(tensor)
    if tensor.layout is not torch.strided:
        return f"is sparse ({_short(tensor.layout)})", "Make it dense, with tensor.to_dense()."
    if tensor.is_meta:
        return "is on the meta device, without values", "Load or initialise its values first, on a real device."
    if tensor.dtype.itemsize == 1 and tensor.is_floating_point():
        return f"is {_short(tensor.dtype)}", "Convert it, with its scale, to float32, float16 or bfloat16."
    return None


def _other_type(tensor: Tensor, own: Tensor) -> tuple[str, str] | None:
    """Return how the type of a source tensor differs from the model's so that a copy would lose its meaning."""
    if not (own.is_floating_point() or own.is_complex()):
        return None
    if tensor.is_complex() and not own.is_complex():
        return f"is complex and the model's is {_short(own.dtype)}", "Build the model with complex parameters."
    return None if tensor.is_floating_point() or tensor.is_complex() else _quantised(tensor)


def _quantised(tensor: Tensor) -> tuple[str, str]:
    return f"is quantised or of integers ({_short(tensor.dtype)})", "Take the weights from before quantisation."


def _short(name: object) -> str:
    return str(name).removeprefix("torch.")
