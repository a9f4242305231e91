"""Freezing, the same for all strategies: no gradient, no update, no change of running statistics."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor, nn

from conservtl.compat import BatchNormBase, NormBase, after_loading
from conservtl.errors import SpecError
from conservtl.layers import Layer, canonical, layer_of, named_parameters, unwrap
from conservtl.layers.names import own_parameters, owner
from conservtl.plan.row import Row

__all__ = [
    "extendable",
    "found_frozen",
    "freeze",
    "handed_in_frozen",
    "held_norms",
    "hold_statistics",
    "holds",
    "keeps_batch_statistics",
    "let_train",
    "norms_with_rows",
    "parameter_owners",
    "thaw",
    "tracks_statistics",
]


class _StayInEval:
    """Replaces a norm's ``train`` method, which every ``model.train()`` calls."""

    def __init__(self, norm: nn.Module) -> None:
        self.norm = norm

    def __call__(self, mode: bool = True) -> nn.Module:  # noqa: ARG002 - the signature of Module.train
        self.norm.training = False
        return self.norm


class _KeepStatistics:
    """Replaces a norm's ``reset_running_stats``, by which others begin to compute its statistics anew."""

    def __init__(self, norm: nn.Module) -> None:
        self.norm = norm

    def __call__(self) -> None:
        """Do nothing: a norm in eval mode would keep the reset values for good."""


class _KeepBuffers(_KeepStatistics):
    """Replaces a norm's ``register_buffer``, which an assignment to a buffer calls: one to the reset values is left."""

    def __call__(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:  # type: ignore[override]
        reset = _RESET.get(name)
        if reset is None or tensor is None or tensor.is_meta or not bool((tensor == reset).all()):
            type(self.norm).register_buffer(self.norm, name, tensor, persistent)


_RESET = {"running_mean": 0, "running_var": 1}
_HELD = {"train": _StayInEval, "reset_running_stats": _KeepStatistics, "register_buffer": _KeepBuffers}
"""Methods of a held norm -> what replaces them."""


class _FrozenByPlan:
    """Names of a module's parameters that a plan froze, which tell them from those that the user froze.

    Kept among the module's hooks after loading, so that copies and pickles of the model have it too, and no attribute
    of the module is added. As a hook it does nothing.
    """

    def __init__(self) -> None:
        self.names: set[str] = set()

    def __call__(self, module: nn.Module, incompatible_keys: object) -> None:
        """Do nothing."""


def freeze(model: nn.Module, frozen: Collection[str], keep: Collection[str] = ()) -> bool:
    """Freeze these parameters of a model, and train those again that were frozen here before.

    A parameter that was frozen elsewhere (``requires_grad_(False)`` by hand) stays frozen. A frozen parameter's
    ``grad`` is set to None: with a zero gradient it would still get weight decay and momentum.

    Args:
        model: wrapped or not.
        frozen: names to freeze.
        keep: names among them that still receive gradients, which are dropped before each step: DDP would never
            synchronise a parameter that is unfrozen after wrapping.

    Returns:
        Whether a parameter that was frozen is trained now.
    """
    freed = False
    for name, (module, key) in parameter_owners(model).items():
        parameter = own_parameters(module)[key]
        if name in frozen and name not in keep:
            if parameter.requires_grad:
                _mark(module, key)
                parameter.requires_grad_(False)
        elif key in _marked(module):
            freed |= not parameter.requires_grad
            parameter.requires_grad_(True)
            _unmark(module, key)
        if name in frozen:
            parameter.grad = None
    return freed


def found_frozen(model: nn.Module) -> frozenset[str]:
    """Return the parameters that ask for no gradient by the user's choice, and not because a plan froze them.

    If no parameter asks for a gradient, that is the user's choice for all, unless a plan froze all of them.
    """
    owners = parameter_owners(model)
    still = {name: owner for name, owner in owners.items() if not own_parameters(owner[0])[owner[1]].requires_grad}
    by_hand = frozenset(name for name, (module, key) in still.items() if key not in _marked(module))
    return frozenset(still) if by_hand and len(still) == len(owners) else by_hand


def handed_in_frozen(
    module: str, layers: Sequence[Layer], frozen: Collection[str], added: Collection[str] = ()
) -> bool:
    """Return whether a module is frozen as found, so that what a strategy adds to it is too.

    Its weights tell, or else its other parameters, or else those of its layer.

    Args:
        module: its canonical name.
        layers: the model's layers.
        frozen: parameters that were frozen when the model was handed in.
        added: parameters that strategies added.
    """
    layer = layer_of(layers, module)
    inside = [info for info in layer.parameters if info.name not in added] if layer else []
    own = [info for info in inside if owner(info.name) == module]
    telling = [info for info in own if info.kind == "weight"] or own or inside
    return bool(telling) and all(info.name in frozen for info in telling)


def extendable(model: nn.Module, modules: Sequence[str], layers: Sequence[Layer]) -> list[str]:
    """Return the modules that a strategy adds to by itself: those not frozen as found, or all if each of them is."""
    frozen = found_frozen(model)
    return [name for name in modules if not handed_in_frozen(name, layers, frozen)] or list(modules)


def let_train(model: nn.Module, names: Collection[str]) -> None:
    """Leave it to ``freeze`` whether these parameters are trained, although the user froze them before."""
    for name, (module, key) in parameter_owners(model).items():
        if name in names and not own_parameters(module)[key].requires_grad:
            _mark(module, key)


def thaw(model: nn.Module) -> None:
    """Let all parameters ask for a gradient that a plan froze; those that the user froze stay as they are."""
    for module in model.modules():
        own = own_parameters(module)
        for key in list(_marked(module)):
            if key in own:  # a merged factor is not
                own[key].requires_grad_(True)
            _unmark(module, key)


def _marked(module: nn.Module) -> Collection[str]:
    """Return the names of the module's parameters that a plan froze."""
    return next((hook.names for hook in after_loading(module).values() if isinstance(hook, _FrozenByPlan)), ())


def _mark(module: nn.Module, key: str) -> None:
    if isinstance(module, torch.jit.ScriptModule):
        raise SpecError(
            f"{key!r} of the scripted module {module.original_name} is to be frozen, for which a plan needs hooks that "
            "it does not take. Freeze it before adapt, or script the model after training."
        )
    if not any(isinstance(hook, _FrozenByPlan) for hook in after_loading(module).values()):
        module.register_load_state_dict_post_hook(_FrozenByPlan())  # type: ignore[no-untyped-call]
    for hook in after_loading(module).values():
        if isinstance(hook, _FrozenByPlan):
            hook.names.add(key)


def _unmark(module: nn.Module, key: str) -> None:
    hooks = after_loading(module)
    for number, hook in list(hooks.items()):
        if isinstance(hook, _FrozenByPlan):
            hook.names.discard(key)
            if not hook.names:
                del hooks[number]


def parameter_owners(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Return canonical name of a parameter -> the module that holds it, and its name there; a tied one once."""
    owners: dict[int, tuple[str, nn.Module, str]] = {}
    for prefix, module in unwrap(model).named_modules():
        for key, parameter in own_parameters(module).items():
            owners.setdefault(id(parameter), (canonical(f"{prefix}.{key}" if prefix else key), module, key))
    return {name: (module, key) for name, module, key in owners.values()}


def norms_with_rows(model: nn.Module, rows: Iterable[Row], layers: tuple[Layer, ...]) -> dict[nn.Module, list[Row]]:
    """Return each norm that tracks statistics with the rows of its parameters, or of its layer if it has none."""
    rows_by_name = {row.name: row for row in rows if not row.added}
    names = {id(parameter): name for name, parameter in named_parameters(model).items()}
    norms = {}
    for module, norm in model.named_modules():
        if tracks_statistics(norm):
            owned = [
                name for parameter in norm.parameters(recurse=False) if (name := names[id(parameter)]) in rows_by_name
            ]
            if not owned and (layer := layer_of(layers, canonical(module))):
                owned = [info.name for info in layer.parameters if info.name in rows_by_name]
            norms[norm] = [rows_by_name[name] for name in owned]
    return norms


def holds(rows: Sequence[Row], frozen: Collection[str]) -> bool:
    """Whether a norm with these rows keeps its statistics: all rows are frozen, or a strategy decides so."""
    return any(row.statistics == "hold" for row in rows) or (bool(rows) and all(row.name in frozen for row in rows))


def hold_statistics(norms: Iterable[nn.Module], held: Collection[nn.Module], training: bool) -> None:
    """Keep the norms of frozen layers in eval mode through every ``train()``, and release the others.

    A held norm cannot be reset either: ``update_bn`` of ``torch.optim.swa_utils`` and Lightning's weight averaging set
    statistics to 0 and 1, and expect the passes in train mode that follow to compute them.
    """
    for norm in norms:
        if norm in held:
            norm.__dict__.update({name: replacement(norm) for name, replacement in _HELD.items()})
            norm.training = False
        elif isinstance(norm.__dict__.get("train"), _StayInEval):
            for name in _HELD:
                norm.__dict__.pop(name, None)
            norm.train(training)


def held_norms(model: nn.Module) -> list[nn.Module]:
    """Return the norms that ``hold_statistics`` keeps in eval mode."""
    return [module for module in model.modules() if isinstance(module.__dict__.get("train"), _StayInEval)]


def tracks_statistics(module: nn.Module) -> bool:
    """Whether a module keeps running statistics of its inputs."""
    return isinstance(module, NormBase) and module.track_running_stats


def keeps_batch_statistics(module: nn.Module) -> bool:
    """Whether a module is a batch norm that keeps running statistics; an instance norm uses each example's own."""
    return isinstance(module, BatchNormBase) and tracks_statistics(module)
