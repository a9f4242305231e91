"""The order in which a model uses its parameters, recorded in one forward pass of a copy."""

from __future__ import annotations

import random
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from conservtl.batches import map_tensors, tensors_of
from conservtl.compat import ConvBase, forward_hook_table
from conservtl.errors import SpecError
from conservtl.layers.copying import deep_copy
from conservtl.layers.names import canonical, own_parameters

__all__ = ["Trace", "calls", "first_use", "trace"]


@dataclass(frozen=True)
class Trace:
    """Record of one forward pass.

    Args:
        order: name of a parameter or buffer -> its rank in the order of first use; unused ones are missing.
        outputs: names of the weights used last on the ways to the output tensors, in order of first use; without
            weights that also lead to another output, such as those of features returned beside the scores.
        main: whether one of the outputs is named as the scores (``logits``, or ``out`` in torchvision's segmentation).
    """

    order: dict[str, int] = field(default_factory=dict)
    outputs: tuple[str, ...] = ()
    main: bool = False


def first_use(model: nn.Module, example: Any) -> dict[str, int]:
    """Return name of a parameter or buffer -> its rank in the order of first use; see ``trace``."""
    return trace(model, example).order


def trace(model: nn.Module, example: Any) -> Trace:
    """Run a copy of a model once and record which parameters it uses, and which weights its outputs come from.

    The pass runs on the meta device, without memory or arithmetic. If that fails, integer and boolean inputs (lengths
    of sequences) stay on their device; if that fails too, a real copy of the model runs. The model itself is never
    called.

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
        likeliest: Exception | None = None
        for call in calls(map_tensors(example, place)):
            try:
                return _record(model, call, on_meta=on_meta)
            except Exception as caught:  # noqa: BLE001 -- a model may fail in any way; the next attempt decides
                likeliest = likeliest or caught
        error = likeliest
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


def _record(model: nn.Module, call: Callable[[nn.Module], object], *, on_meta: bool) -> Trace:
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
        recorder = _CallRecorder(names, _weights(model))
        with recorder:
            result = call(clone)
        return Trace(recorder.order, recorder.last_weights(result), _names_scores(result))


def _weights(model: nn.Module) -> set[str]:
    """Return the names of the weights: parameters with two axes longer than 1, and those of maps to one output."""
    maps = {id(own_parameters(m).get("weight")) for m in model.modules() if isinstance(m, nn.Linear | ConvBase)}
    return {
        canonical(name)
        for name, p in model.named_parameters()
        if sum(size > 1 for size in p.shape) > 1
        or (p.ndim > 1 and (id(p) in maps or name.endswith("parametrizations.weight.original1")))
    }


def _names_scores(result: object) -> bool:
    keys = result if isinstance(result, Mapping) else vars(result) if hasattr(result, "__dict__") else ()
    return not isinstance(result, torch.Tensor) and ("logits" in keys or "out" in keys)


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


class _CallRecorder(TorchFunctionMode):
    """Recorder of the first torch call that computes a tensor from each named tensor.

    A call that returns no tensor, such as a query of the shape, does not count, and neither does one that changes a
    named tensor in place: some models rescale their weights at the start of a forward pass.
    """

    def __init__(self, names: dict[int, str], weights: Collection[str]) -> None:
        super().__init__()
        self.names, self.weights = names, weights
        self.order: dict[str, int] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        results = tensors_of(result)
        if any(id(tensor) not in self.names for tensor in results):
            inputs = tensors_of((args, kwargs))
            for tensor in inputs:
                if name := self.names.get(id(tensor)):
                    self.order.setdefault(name, len(self.order))
            way = self._way(inputs)
            for tensor in results:
                if id(tensor) not in self.names:
                    tensor.weights_before = way  # type: ignore[attr-defined]
        return result

    def last_weights(self, result: object) -> tuple[str, ...]:
        """Return the weights used last on the ways to the outputs, without those on the way to another of them."""
        ways = [way for tensor in tensors_of(result) if (way := _way_of(tensor)) is not None]
        last = {name for way in ways if not way.constant for name in way.last}
        before = {name for way in ways for name in way.before}
        return tuple(sorted(last - before or last, key=self.order.__getitem__))

    def _way(self, inputs: list[torch.Tensor]) -> _Way:
        """Return the way of a call's results: the weights it uses itself are the last, if it uses any."""
        own: set[str] = set()
        last: set[str] = set()
        before: set[str] = set()
        constant = True
        for tensor in inputs:
            name, way = self.names.get(id(tensor)), _way_of(tensor)
            if name is not None:
                own |= {name} & set(self.weights)
            elif way is not None and way.constant:
                own |= way.last
            else:
                constant = False
                if way is not None:
                    last |= way.last
                    before |= way.before
        if own:  # of a call with several weights (recurrent, attention) the one that it takes last
            final = {max(own, key=self.order.__getitem__)}
            return _Way(frozenset(own if constant else final), frozenset((before | last | own) - final), constant)
        return _Way(frozenset(last), frozenset(before), constant and bool(inputs))


@dataclass(frozen=True)
class _Way:
    """The weights that a tensor comes from.

    Args:
        last: those used last.
        before: those used before.
        constant: whether it depends on parameters alone, as a transposed weight does.
    """

    last: frozenset[str]
    before: frozenset[str]
    constant: bool


def _way_of(tensor: torch.Tensor) -> _Way | None:
    return getattr(tensor, "weights_before", None)
