"""Amplitudes of hidden units on a model: added, removed, and multiplied into the weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from conservtl.compat import forward_hooks, forward_pre_hooks, remove_forward_hooks, remove_forward_pre_hooks
from conservtl.errors import SpecError
from conservtl.layers import unwrap
from conservtl.layers.names import holder_counts, named_modules, own_parameters
from conservtl.layers.plain import plain_module, replace_module
from conservtl.methods.lhuc.folding import amplitude, begin_pass, end_pass, scaled_in_this_pass
from conservtl.methods.lhuc.hidden_units import channel_dim, is_recurrent, unit_count

__all__ = ["PARAMETER", "add_amplitudes", "merge_amplitudes", "plain_amplitudes", "remove_amplitudes"]

PARAMETER = "lhuc"
"""Name of the amplitudes' parameter on the module whose output they scale."""


def add_amplitudes(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Add amplitudes of 1 to modules, and return the names of the new parameters.

    Raises:
        SpecError: a module has amplitudes already; none is changed.
    """
    modules = named_modules(model)
    if twice := [name for name in names if hasattr(modules[name], PARAMETER)]:
        raise SpecError(
            f"LHUC: module {twice[0]!r} has amplitudes already. Merge or retract those of an earlier adaptation first "
            "(LHUC().merge(model), LHUC().retract(model)), and name each module in one LHUC only."
        )
    first = next(unwrap(model).parameters())
    for name in names:
        module = modules[name]
        like = next(module.parameters(recurse=False), first)
        zeros = torch.zeros(unit_count(module) or 0, device=like.device, dtype=like.dtype)
        module.register_parameter(PARAMETER, nn.Parameter(zeros))
        module.register_forward_pre_hook(_fold)
        module.register_forward_hook(_scale, prepend=True, always_call=True)
    root = unwrap(model)
    _norms.pop(root, None)
    if _begin not in forward_pre_hooks(root):
        root.register_forward_pre_hook(_begin)
        root.register_forward_hook(_end, always_call=True)
    return [f"{name}.{PARAMETER}" if name else PARAMETER for name in names]


def remove_amplitudes(model: nn.Module) -> None:
    """Remove all amplitudes, whatever their values."""
    for module in _scaled_modules(model):
        _remove(module)
    _release(model)


@torch.no_grad()
def merge_amplitudes(model: nn.Module) -> bool:
    """Multiply amplitudes into the weights and biases that they scale, and return whether none is left.

    Amplitudes stay on recurrent layers, on norms without weights, on weights that several modules share and on
    parametrised weights.
    """
    holders = holder_counts(model)
    left = False
    for module in _scaled_modules(model):
        own = own_parameters(module)
        values = [own[name] for name in ("weight", "bias") if name in own]
        shared = any(holders[id(value)] > 1 for value in values)
        if "weight" not in own or shared or is_recurrent(module):
            left = True
            continue
        factor = amplitude(own[PARAMETER])
        for value in values:
            value.mul_(factor.view(-1, *[1] * (value.ndim - 1)))
        _remove(module)
    _release(model)
    return not left


def plain_amplitudes(model: nn.Module) -> nn.Module:
    """Return the model with each module that still has amplitudes inside one that scales its output."""
    for module in _scaled_modules(model):
        parameter: Any = getattr(module, PARAMETER)
        _remove(module)
        scaled = _ScaledSteps(module, parameter) if is_recurrent(module) else _Scaled(module, parameter)
        model = replace_module(model, module, plain_module(scaled))
    _release(model)
    return model


class _Scaled(nn.Module):
    """A module whose output is scaled, by operations that torch.fx can trace."""

    def __init__(self, module: nn.Module, parameter: nn.Parameter) -> None:
        super().__init__()
        self.module, self.lhuc, self.dim = module, parameter, channel_dim(module)
        self.train(module.training)

    def forward(self, x: Tensor) -> Any:
        output = self.module(x).transpose(self.dim, -1)
        return (output * amplitude(self.lhuc).to(output.dtype)).transpose(self.dim, -1)


class _ScaledSteps(nn.Module):
    """A recurrent layer whose outputs are scaled at each step; its inputs and outputs are padded tensors."""

    def __init__(self, module: nn.Module, parameter: nn.Parameter) -> None:
        super().__init__()
        self.module, self.lhuc = module, parameter
        self.train(module.training)

    def forward(self, input: Tensor, hx: Any = None) -> Any:  # noqa: A002 - as in torch
        results = self.module(input, hx)
        return results[0] * amplitude(self.lhuc).to(results[0].dtype), results[1]


def _begin(model: nn.Module, _: Any) -> None:
    """Scale the weights of all norms when the model's forward pass begins: a forward pre-hook at module level."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return
    if model not in _norms:
        _norms[model] = [module for module in _scaled_modules(model) if _is_norm(module)]
    begin_pass(_norms[model], PARAMETER)


def _end(model: nn.Module, *_: Any) -> None:
    if not torch.compiler.is_compiling():
        end_pass(_norms.get(model, ()))


_norms: WeakKeyDictionary[nn.Module, list[nn.Module]] = WeakKeyDictionary()
_FOLDED = "lhuc_folded"  # name of what a module holds while its weights are scaled


def _fold(module: nn.Module, _: Any) -> None:
    """Put scaled weights in place of a module's for this pass: no activation is copied, and none is kept for it.

    Norms always, and on a GPU linear maps and convolutions that are trained, since their weights' gradients are
    computed anyway. A forward pre-hook, at module level as ``_scale``.
    """
    if torch.compiler.is_compiling():
        return
    scaled = scaled_in_this_pass(module)
    if scaled is None:
        scaled = _scaled_alone(module)
    vars(module).update(scaled)
    vars(module)[_FOLDED] = tuple(scaled)


def _scaled_alone(module: nn.Module) -> dict[str, Tensor]:
    """Return the scaled tensors of a module; none if its output is scaled instead."""
    own = own_parameters(module)
    weight = own.get("weight")
    if weight is None or is_recurrent(module):
        return {}
    if weight.ndim > 1 and not (weight.is_cuda and weight.requires_grad and torch.is_grad_enabled()):
        return {}
    factor = amplitude(own[PARAMETER])
    values = {name: own[name] for name in ("weight", "bias") if own.get(name) is not None}
    return {name: value * factor.to(value.dtype).view(-1, *[1] * (value.ndim - 1)) for name, value in values.items()}


def _scale(module: nn.Module, _: Any, output: Any) -> Any:
    """Scale a module's output, unless its weights were scaled: a forward hook.

    It stands at module level so that copies and pickles of the model keep it. After an error there is no output.
    """
    if not torch.compiler.is_compiling():  # a pass that is traced folds nothing
        folded = vars(module).pop(_FOLDED, ())
        for name in folded:
            del vars(module)[name]
        if folded:
            return None
    if output is None:
        return None
    factor = amplitude(getattr(module, PARAMETER))
    if isinstance(output, tuple):  # of a recurrent layer: the outputs of all steps are scaled, its state is not
        outputs, *state = output
        if isinstance(outputs, PackedSequence):
            return outputs._replace(data=outputs.data * factor.to(outputs.data.dtype)), *state
        return outputs * factor.to(outputs.dtype), *state
    shape = [1] * output.ndim
    shape[channel_dim(module)] = -1
    return output * factor.to(output.dtype).view(shape)


def _scaled_modules(model: nn.Module) -> list[nn.Module]:
    return [module for module in unwrap(model).modules() if _scale in forward_hooks(module)]


def _is_norm(module: nn.Module) -> bool:
    weight = own_parameters(module).get("weight")
    return weight is not None and weight.ndim == 1


def _remove(module: nn.Module) -> None:
    remove_forward_hooks(module, lambda hook: hook is _scale)
    remove_forward_pre_hooks(module, lambda hook: hook is _fold)
    delattr(module, PARAMETER)


def _release(model: nn.Module) -> None:
    """Remove the hooks of the whole model if no module is scaled any more."""
    root = unwrap(model)
    _norms.pop(root, None)
    if not _scaled_modules(root):
        remove_forward_hooks(root, lambda hook: hook is _end)
        remove_forward_pre_hooks(root, lambda hook: hook is _begin)
