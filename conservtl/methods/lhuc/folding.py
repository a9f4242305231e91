"""Weights and biases of all norms of a model times their amplitudes, computed together when a forward pass begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from conservtl.compat import foreach_add_, foreach_mul, version_of

__all__ = ["amplitude", "begin_pass", "end_pass", "scaled_in_this_pass"]


def amplitude(parameter: Tensor) -> Tensor:
    """Return the amplitudes, between 0 and 2, of what is trained."""
    return 2 * torch.sigmoid(parameter)


@dataclass(frozen=True)
class _Scaled:
    """Scaled tensors of one module, by the name that they stand in for."""

    parameters: dict[str, Tensor]
    versions: list[int]
    tensors: dict[str, Tensor]
    with_gradient: bool


_passes: WeakKeyDictionary[nn.Module, _Scaled] = WeakKeyDictionary()


def begin_pass(modules: Sequence[nn.Module], name: str) -> None:
    """Scale the weights and biases of modules, as long as a forward pass of the model runs.

    A network of many small norms would launch ten small kernels for each otherwise.
    """
    alike: dict[Any, list[tuple[nn.Module, dict[str, Tensor]]]] = {}
    for module in modules:
        found: dict[str, Any] = {one: getattr(module, one, None) for one in ("weight", "bias", name)}
        own = {one: tensor for one, tensor in found.items() if tensor is not None}
        kinds = {(type(tensor), tensor.dtype, tensor.device) for tensor in own.values()}
        if "weight" in own and kinds <= {(nn.Parameter, own[name].dtype, own[name].device)}:
            alike.setdefault(kinds.pop(), []).append((module, own))
    for members in alike.values():
        amplitudes = [own[name] for _, own in members]
        values = [(at, own[one]) for one in ("weight", "bias") for at, (_, own) in enumerate(members) if one in own]
        places = tuple(at for at, _ in values)
        scaled = iter(_ScaleAll.apply(places, *amplitudes, *(value for _, value in values)))  # type: ignore[no-untyped-call]
        tensors: list[dict[str, Tensor]] = [{} for _ in members]
        for one in ("weight", "bias"):
            for at, (_, own) in enumerate(members):
                if one in own:
                    tensors[at][one] = next(scaled)
        for (module, own), result in zip(members, tensors, strict=True):
            _passes[module] = _Scaled(own, _versions(own), result, torch.is_grad_enabled())


def end_pass(modules: Sequence[nn.Module]) -> None:
    """Forget what was scaled."""
    for module in modules:
        _passes.pop(module, None)


def scaled_in_this_pass(module: nn.Module) -> dict[str, Tensor] | None:
    """Return the scaled tensors of a module; None if they are not to be used.

    That is outside a pass of the model, if a parameter was changed since it began, and in a checkpoint of activations,
    which computes a part of the pass again later from what that part has computed.
    """
    found = _passes.get(module)
    if found is None or found.with_gradient != torch.is_grad_enabled():
        return None
    if any(getattr(module, name) is not parameter for name, parameter in found.parameters.items()):
        return None
    if _versions(found.parameters) != found.versions:
        return None
    try:
        with torch.autograd.graph.disable_saved_tensors_hooks("not used"):
            return found.tensors
    except RuntimeError:  # hooks are in force
        return None


def _versions(parameters: dict[str, Tensor]) -> list[int]:
    return list(map(version_of, parameters.values()))


class _ScaleAll(torch.autograd.Function):
    """Values times 2 sigmoid(r), with the gradients of all values and of all r computed in lists."""

    generate_vmap_rule = True

    @staticmethod
    def forward(places: tuple[int, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
        count = max(places) + 1
        factors = _factors(tensors[:count])
        return tuple(foreach_mul(tensors[count:], [factors[place] for place in places]))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:  # noqa: ARG004
        ctx.places = inputs[0]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> Any:
        count = max(ctx.places) + 1
        amplitudes, values = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        used = [at for at, one in enumerate(upstream) if one is not None]
        if not used:
            return (None,) * (1 + len(ctx.saved_tensors))
        factors = _factors(amplitudes)
        grads = [one for one in upstream if one is not None]
        of_values: list[Tensor | None] = [None] * len(values)
        trained = [at for at in used if ctx.needs_input_grad[1 + count + at]]
        if trained:
            wanted = [one for at, one in enumerate(upstream) if at in trained and one is not None]
            scaled = foreach_mul(wanted, [factors[ctx.places[at]] for at in trained])
            for at, one in zip(trained, scaled, strict=True):
                of_values[at] = one
        products = foreach_mul(grads, [values[at] for at in used])
        first = {ctx.places[at]: product for at, product in zip(used, products, strict=True) if at < count}
        second = {ctx.places[at]: product for at, product in zip(used, products, strict=True) if at >= count}
        sums = [first[place] if place in first else torch.zeros_like(one) for place, one in enumerate(amplitudes)]
        if second:
            foreach_add_([sums[place] for place in second], list(second.values()))
        flat = torch.cat(list(factors))
        slopes = torch.cat(sums) * flat * (1 - flat / 2)  # 2 s' = f (1 - f / 2)
        return (None, *torch.split_with_sizes(slopes, [len(one) for one in amplitudes]), *of_values)


def _factors(amplitudes: Sequence[Tensor]) -> Sequence[Tensor]:
    return torch.split_with_sizes(amplitude(torch.cat(list(amplitudes))), [len(one) for one in amplitudes])
