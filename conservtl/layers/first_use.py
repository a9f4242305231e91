"""The order in which a model uses its parameters, recorded in one forward pass of a copy."""

from __future__ import annotations

import random
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from conservtl.batches import map_tensors, tensors_of
from conservtl.compat import forward_hook_table
from conservtl.errors import SpecError
from conservtl.layers.copying import deep_copy
from conservtl.layers.names import canonical

__all__ = ["calls", "first_use"]


def first_use(model: nn.Module, example: Any) -> dict[str, int]:
    """Return name of a parameter or buffer -> its rank in the order of first use; unused ones are missing.

    The pass runs on the meta device, without memory or arithmetic. If that fails, integer and boolean inputs (lengths
    of sequences) stay on their device; if that fails too, a real copy of the model runs. The model itself is never
    called.

    Args:
        model: The model, unwrapped.
        example: A tensor, a tuple or list of arguments, a dictionary of keyword arguments, or a batch of
            (inputs, labels).

    Raises:
        SpecError: The model cannot be called with the example.
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    placements: tuple[tuple[bool, Callable[[torch.Tensor], torch.Tensor]], ...] = (
        (True, lambda tensor: tensor.to("meta")),
        (True, lambda tensor: tensor.clone() if _is_integer(tensor) else tensor.to("meta")),
        (False, lambda tensor: tensor.to(device, copy=True)),
    )
    error: Exception | None = None
    for on_meta, place in placements:
        for call in calls(map_tensors(example, place)):
            try:
                return _record(model, call, on_meta=on_meta)
            except Exception as caught:  # noqa: BLE001 -- a model may fail in any way; the next attempt decides
                error = caught
    raise SpecError(
        f"example: the model must accept it; received {type(example).__name__}, and the model raises "
        f"{type(error).__name__}: {error}. Pass a tensor, a tuple of arguments or a dictionary of them"
    ) from error


def _is_integer(tensor: torch.Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def _is_plain(sequence: Any) -> bool:
    return type(sequence) in (tuple, list)


def calls(example: Any) -> Iterator[Callable[[nn.Module], object]]:
    """Yield the ways to call a model with the example, the likeliest first."""
    if isinstance(example, dict) and all(isinstance(key, str) for key in example):
        yield lambda model: model(**example)
    if _is_plain(example):
        yield lambda model: model(*example)
    yield lambda model: model(example)
    if _is_plain(example) and example:
        yield lambda model: model(example[0])


def _record(model: nn.Module, call: Callable[[nn.Module], object], *, on_meta: bool) -> dict[str, int]:
    with _isolated(model):
        twins = {id(tensor): _twin(tensor, on_meta=on_meta) for tensor in _tensors(model)}
        # Forward hooks are observers: neither copied nor called. Pre-hooks stay: old weight_norm is one.
        hooks = {id(forward_hook_table(module)): OrderedDict[int, Any]() for module in model.modules()}
        memo: dict[int, Any] = {**twins, **hooks}
        clone = deep_copy(model, memo).eval()
        for module in model.modules():  # except hooks that compute the output
            table = forward_hook_table(module)
            needed = {key: hook for key, hook in table.items() if getattr(hook, "computes", False)}
            hooks[id(table)].update(deep_copy(needed, memo))
        names = {
            id(twins[id(tensor)]): canonical(name)
            for named in (model.named_buffers(), model.named_parameters())
            for name, tensor in named
        }
        recorder = _Recorder(names)
        with recorder:
            call(clone)
    return recorder.order


def _tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    for module in model.modules():
        yield from module.parameters(recurse=False)
        yield from module.buffers(recurse=False)
        # Plain attributes too: they must be on the same device.
        yield from (value for value in vars(module).values() if isinstance(value, torch.Tensor))


def _twin(tensor: torch.Tensor, *, on_meta: bool) -> torch.Tensor:
    data = torch.empty_like(tensor, device="meta") if on_meta else tensor.detach().clone()
    return nn.Parameter(data, requires_grad=False) if isinstance(tensor, nn.Parameter) else data.detach()


@contextmanager
def _isolated(model: nn.Module) -> Iterator[None]:
    """Run a block without gradients, warnings or compilation; restore the random states."""
    state = random.getstate()
    devices = sorted({p.device.index for p in model.parameters() if p.is_cuda and p.device.index is not None})
    with ExitStack() as stack:
        stack.callback(random.setstate, state)
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.random.fork_rng(devices))
        stack.enter_context(warnings.catch_warnings(action="ignore"))
        if "torch._dynamo" in sys.modules:  # otherwise no module is compiled
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


class _Recorder(TorchFunctionMode):
    """Recorder of the first torch call that computes a tensor from each named tensor.

    A call that returns no tensor, such as a query of the shape, does not count.
    """

    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()
        self.names = names
        self.order: dict[str, int] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if tensors_of(result):
            for tensor in tensors_of((args, kwargs)):
                if name := self.names.get(id(tensor)):
                    self.order.setdefault(name, len(self.order))
        return result
