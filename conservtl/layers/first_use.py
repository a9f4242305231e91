"""The order in which a model uses its parameters, watched in one forward pass of a copy."""

from __future__ import annotations

import copy
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
from conservtl.layers.names import canonical

__all__ = ["calls", "first_use"]


def first_use(model: nn.Module, example: Any) -> dict[str, int]:
    """Name of a parameter or buffer -> its place in the order of first use; unused ones are missing.

    The pass runs on the meta device, where it costs neither memory nor arithmetic. Models that look
    into their inputs (lengths, packed sequences) get those on the CPU, and if that fails too, a real
    copy runs. The model itself is never called.

    Args:
        model: The model, unwrapped.
        example: A tensor, a tuple or list of arguments, or a dictionary of keyword arguments; a batch
            of (inputs, labels) serves too.

    Raises:
        SpecError: The model cannot be called with the example.
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    placements: tuple[tuple[bool, Callable[[torch.Tensor], torch.Tensor]], ...] = (
        (True, lambda tensor: tensor.to("meta")),
        (True, lambda tensor: tensor.clone() if _counts(tensor) else tensor.to("meta")),
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
        f"example: must be what the model can be called with, got {type(example).__name__}, at which it "
        f"raises {type(error).__name__}: {error}. Pass a tensor, a tuple of arguments or a dictionary of them"
    ) from error


def _counts(tensor: torch.Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def _plain(sequence: Any) -> bool:
    return type(sequence) in (tuple, list)


def calls(example: Any) -> Iterator[Callable[[nn.Module], object]]:
    """The ways to hand the example over, the likeliest first."""
    if isinstance(example, dict) and all(isinstance(key, str) for key in example):
        yield lambda model: model(**example)
    if _plain(example):
        yield lambda model: model(*example)
    yield lambda model: model(example)
    if _plain(example) and example:
        yield lambda model: model(example[0])


def _record(model: nn.Module, call: Callable[[nn.Module], object], *, on_meta: bool) -> dict[str, int]:
    with _undisturbed(model):
        twins = {id(tensor): _twin(tensor, on_meta=on_meta) for tensor in _tensors(model)}
        # Hooks are the user's observers: neither copied nor called. Pre-hooks stay, old weight_norm is one.
        hooks = {id(forward_hook_table(module)): OrderedDict[int, Any]() for module in model.modules()}
        memo: dict[int, Any] = {**twins, **hooks}
        clone = copy.deepcopy(model, memo).eval()
        for module in model.modules():  # but for those that the model needs to run
            table = forward_hook_table(module)
            needed = {key: hook for key, hook in table.items() if getattr(hook, "computes", False)}
            hooks[id(table)].update(copy.deepcopy(needed, memo))
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
        # Plain attributes too: deepcopy refuses those that carry a graph.
        yield from (value for value in vars(module).values() if isinstance(value, torch.Tensor))


def _twin(tensor: torch.Tensor, *, on_meta: bool) -> torch.Tensor:
    data = torch.empty_like(tensor, device="meta") if on_meta else tensor.detach().clone()
    return nn.Parameter(data, requires_grad=False) if isinstance(tensor, nn.Parameter) else data.detach()


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """No gradients, no warnings, no compilation; random states put back."""
    state = random.getstate()
    devices = sorted({p.device.index for p in model.parameters() if p.is_cuda and p.device.index is not None})
    with ExitStack() as stack:
        stack.callback(random.setstate, state)
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.random.fork_rng(devices))
        stack.enter_context(warnings.catch_warnings(action="ignore"))
        if "torch._dynamo" in sys.modules:  # otherwise nothing is compiled
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


class _Recorder(TorchFunctionMode):
    """Notes the first torch call that makes a tensor out of each named tensor.

    Questions for a shape or a dtype make no tensor and are no use of it.
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
