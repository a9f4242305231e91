# ruff: noqa: SLF001 - this module is the one place that reads private attributes
"""Private names of torch and Accelerate, each with the reason no public name will do.

``tests/test_compat.py`` pins what each of them does, so that an upgrade that changes one fails there first.
"""

from __future__ import annotations

import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Collection, MutableMapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.modules.batchnorm import _BatchNorm as BatchNormBase  # one base of 1d, 2d, 3d and synchronised batch norm
from torch.nn.modules.batchnorm import _NormBase as NormBase  # one base of every norm that can track statistics
from torch.nn.modules.conv import _ConvNd as ConvBase  # one base of all convolutions
from torch.nn.modules.instancenorm import _InstanceNorm as InstanceNormBase  # one base of all instance norms
from torch.utils._pytree import tree_leaves, tree_map  # torch 2.11 has no public pytree yet

__all__ = [
    "ACCELERATE_ATTRIBUTES",
    "BatchNormBase",
    "ConvBase",
    "InstanceNormBase",
    "NormBase",
    "accelerate_states",
    "accumulates",
    "after_loading",
    "bundle_url",
    "convolved",
    "default_store",
    "filled_by_transformers",
    "foreach_abs_",
    "foreach_add_",
    "foreach_addcmul_",
    "foreach_clamp_max_",
    "foreach_clamp_min_",
    "foreach_copy_",
    "foreach_div",
    "foreach_lerp_",
    "foreach_mul",
    "foreach_mul_",
    "foreach_norm",
    "foreach_reciprocal_",
    "foreach_sub",
    "forget_graphs",
    "forget_schedulers",
    "forward_hook_table",
    "forward_hooks",
    "forward_pre_hooks",
    "guard_hooks",
    "has_load_hooks",
    "has_scheduler",
    "hook_tables",
    "hooks_are_guarded",
    "in_backward",
    "load_hook_tables",
    "metadata_of",
    "note_of",
    "outside_graphs",
    "plain_again",
    "prepared_objects",
    "register_first",
    "remove_forward_hooks",
    "remove_forward_pre_hooks",
    "reset_method",
    "saved_by_node",
    "scaler_state",
    "tf32_settings",
    "tree_leaves",
    "tree_map",
    "version_of",
    "with_metadata",
    "without_graphs",
]

_Function = TypeVar("_Function", bound=Callable[..., Any])

# One kernel launch for many tensors: torch has no public multi-tensor arithmetic. Bound here without a wrapper, since
# they run in every step.
foreach_abs_ = torch._foreach_abs_
foreach_add_ = torch._foreach_add_
foreach_addcmul_ = torch._foreach_addcmul_
foreach_clamp_max_ = torch._foreach_clamp_max_
foreach_clamp_min_ = torch._foreach_clamp_min_
foreach_copy_ = torch._foreach_copy_
foreach_div = torch._foreach_div
foreach_lerp_ = torch._foreach_lerp_
foreach_mul = torch._foreach_mul
foreach_mul_ = torch._foreach_mul_
foreach_norm = torch._foreach_norm
foreach_reciprocal_ = torch._foreach_reciprocal_
foreach_sub = torch._foreach_sub


def after_loading(module: nn.Module) -> MutableMapping[int, Callable[..., Any]]:
    """Return the table of the hooks that follow ``load_state_dict``: torch registers hooks but does not list them."""
    return module._load_state_dict_post_hooks


def bundle_url(bundle: Any) -> str | None:
    """Return the URL of the weights of one of torchaudio's bundles; None if it names them in another way.

    No public name tells it before the download.
    """
    path = getattr(bundle, "_path", None)
    if not isinstance(path, str):
        return None
    return path if path.startswith("https:") else f"https://download.pytorch.org/torchaudio/models/{path}"


def convolved(module: nn.Module, inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return a convolution of torch with another weight and no bias: no public function pads as its modules do."""
    forward: Callable[..., torch.Tensor] = module._conv_forward  # type: ignore[assignment]
    return forward(inputs, weight, None)


def default_store() -> Any:
    """Return the store that processes found each other by: no public name gives the one of the default group."""
    return torch.distributed.distributed_c10d._get_default_store()


def plain_again(module: nn.Module) -> None:
    """Undo ``fully_shard`` on one module whose parameters are whole again: torch has no inverse of it.

    The hooks, the state and the class that it gave to the module go.
    """
    from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY
    from torch.distributed.fsdp import FSDPModule

    remove_forward_hooks(module, _of_fsdp)
    remove_forward_pre_hooks(module, _of_fsdp)
    for table in (
        module._state_dict_pre_hooks,
        module._load_state_dict_pre_hooks,
        module._load_state_dict_post_hooks,
    ):
        for key in [key for key, hook in table.items() if _of_fsdp(hook)]:
            del table[key]
    if isinstance(module, FSDPModule):
        module.__class__ = type(module).__mro__[FSDPModule._orig_cls_mro_index]
    for name in (STATE_KEY, REGISTRY_KEY, "_is_fsdp_managed_module", "_fsdp_use_orig_params"):
        module.__dict__.pop(name, None)


def filled_by_transformers(parameter: nn.Parameter) -> bool:
    """Return whether Hugging Face's ``from_pretrained`` loaded a parameter: it reports the rest to its caller alone."""
    return bool(getattr(parameter, "_is_hf_initialized", False))


def outside_graphs(function: _Function) -> _Function:
    """Return a function that runs as it is when a compiled model calls it: torch has no types for its own wrapper."""
    wrapped: _Function = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return wrapped


def forget_graphs() -> None:
    """Drop the graphs of all compiled models, which compile again when they are called.

    A graph keeps which parameters asked for a gradient, and which hooks there were, when it was made. torch loads its
    compiler when something is compiled first; no public name says whether it did.
    """
    if "torch._dynamo" in sys.modules:
        with warnings.catch_warnings():  # on a GPU it imports torch's compiler, parts of which torch calls deprecated
            warnings.simplefilter("ignore", DeprecationWarning)
            torch.compiler.reset()


def guard_hooks() -> None:
    """Drop the graphs of all compiled models, and have later ones made anew for a model with other hooks.

    By default a graph is used for every model of a class, whatever its hooks. The setting has no public name; it can be
    made once torch has loaded its compiler, and stays.
    """
    config = sys.modules.get("torch._dynamo.config")
    if config is not None:
        config.skip_nnmodule_hook_guards = False  # type: ignore[attr-defined]
        forget_graphs()


def hooks_are_guarded() -> bool:
    """Return whether ``guard_hooks`` has nothing left to do, or no compiler is loaded."""
    config = sys.modules.get("torch._dynamo.config")
    return config is None or not config.skip_nnmodule_hook_guards


def tf32_settings() -> list[tuple[Callable[[], Any], Callable[[Any], None]]]:
    """Return how to read and set whether matrix products, and convolutions, may round to TF32; True and False set both.

    torch has two ways, and the older one cannot be read once the newer has been used.
    """

    def pair(backend: Any, name: str, words: tuple[Any, Any] | None = None) -> Any:
        def put(value: Any) -> None:
            setattr(backend, name, words[value] if words is not None and isinstance(value, bool) else value)

        return (lambda: getattr(backend, name)), put

    older = [(torch.backends.cuda.matmul, "allow_tf32"), (torch.backends.cudnn, "allow_tf32")]
    try:
        for backend, name in older:
            getattr(backend, name)
    except RuntimeError:
        words = ("ieee", "tf32")
        return [
            pair(torch.backends.cuda.matmul, "fp32_precision", words),
            pair(torch.backends.cudnn.conv, "fp32_precision", words),  # type: ignore[attr-defined]
        ]
    return [pair(backend, name) for backend, name in older]


def without_graphs() -> AbstractContextManager[Any]:
    """Return a context in which compiled models run as they are; no compiler is loaded for it."""
    loaded = "torch._dynamo" in sys.modules
    return torch.compiler.set_stance("force_eager") if loaded else nullcontext()


def forward_hooks(module: nn.Module) -> Collection[Callable[..., Any]]:
    """Return a module's forward hooks: torch registers hooks but does not list them."""
    return module._forward_hooks.values()


def forward_pre_hooks(module: nn.Module) -> Collection[Callable[..., Any]]:
    """Return a module's forward pre-hooks: torch registers hooks but does not list them."""
    return module._forward_pre_hooks.values()


def forward_hook_table(module: nn.Module) -> dict[int, Callable[..., Any]]:
    """Return the dictionary that holds a module's forward hooks, for a copy that leaves hooks out."""
    return module._forward_hooks


def has_load_hooks(module: nn.Module) -> bool:
    """Return whether a module changes a state dict before it loads it: torch keeps such hooks in private names only.

    Counting batches is no change, and neither are the hooks of FSDP, which gather nothing here.
    """
    hooks = [hook for hook in module._load_state_dict_pre_hooks.values() if not _of_fsdp(hook)]
    own = type(module)._load_from_state_dict not in _PLAIN_LOADS
    return bool(hooks) or own or type(module).load_state_dict is not nn.Module.load_state_dict


_PLAIN_LOADS = tuple(cls._load_from_state_dict for cls in (nn.Module, NormBase, InstanceNormBase))


def _of_fsdp(hook: Any) -> bool:
    return str(getattr(getattr(hook, "hook", hook), "__module__", "")).startswith("torch.distributed.fsdp")


def version_of(tensor: torch.Tensor) -> int:
    """Return how often a tensor was written into, -1 if torch does not count: it shows no other sign of that."""
    return -1 if tensor.is_inference() else tensor._version


def hook_tables(module: nn.Module) -> list[dict[int, Any]]:
    """Return the dictionaries of a module's hooks that loading does not need, for a copy that leaves them out."""
    names = (
        "_forward_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_hooks_always_called",
        "_forward_pre_hooks",
        "_forward_pre_hooks_with_kwargs",
        "_backward_hooks",
        "_backward_pre_hooks",
        "_state_dict_hooks",
        "_state_dict_pre_hooks",
        "_load_state_dict_post_hooks",
    )
    return [vars(module)[name] for name in names if name in vars(module)]


def load_hook_tables(module: nn.Module) -> list[dict[int, Any]]:
    """Return the dictionaries of a module's hooks before it is loaded: torch registers hooks but does not list them."""
    return [module._load_state_dict_pre_hooks]


def metadata_of(state: Any) -> dict[str, dict[str, Any]]:
    """Return the version of each module that wrote a state dict; empty where none is kept (safetensors)."""
    return dict(metadata) if isinstance(metadata := getattr(state, "_metadata", None), dict) else {}


def with_metadata(state: dict[str, Any], metadata: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return a state dict that carries the versions of modules, as ``load_state_dict`` reads them."""
    versioned: OrderedDict[str, Any] = OrderedDict(state)
    versioned._metadata = metadata  # type: ignore[attr-defined]
    return versioned


def remove_forward_hooks(module: nn.Module, matches: Callable[[Any], bool]) -> None:
    """Remove the forward hooks that match: the handles of the original do not remove hooks of a copied model."""
    _remove(matches, module._forward_hooks, module._forward_hooks_with_kwargs, module._forward_hooks_always_called)


def remove_forward_pre_hooks(module: nn.Module, matches: Callable[[Any], bool]) -> None:
    """Remove the forward pre-hooks that match: the handles of the original do not remove hooks of a copied model."""
    _remove(matches, module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs)


def _remove(matches: Callable[[Any], bool], hooks: dict[int, Any], *flags: dict[int, Any]) -> None:
    for key in [key for key, hook in hooks.items() if matches(hook)]:
        for table in (hooks, *flags):
            table.pop(key, None)


def register_first(model: nn.Module, name: str, module: nn.Module) -> None:
    """Register a child before all others: ``add_module`` appends only, and the order says what runs first."""
    children = dict(model._modules)
    model._modules.clear()
    model._modules.update({name: module, **children})


def reset_method(module: nn.Module) -> Callable[[], object] | None:
    """Return the method that initialises a module's parameters: attention and transformers have a private one only."""
    method = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
    return method if callable(method) else None


def scaler_state(scaler: GradScaler, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return a gradient scaler's notes on the current step: whether gradients are unscaled has no public answer.

    The dictionary is a new object after each ``update()``; ``["stage"].name`` is READY, UNSCALED or STEPPED.
    """
    state: dict[str, Any] = scaler._per_optimizer_states[id(optimizer)]
    return state


_SCHEDULED = "_wrapped_by_lr_sched"


def has_scheduler(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether a scheduler of torch was made for an optimizer: the first wraps and marks the ``step``."""
    return hasattr(optimizer.step, _SCHEDULED)


def forget_schedulers(optimizer: torch.optim.Optimizer) -> None:
    """Let ``has_scheduler`` return False until another is made: the wrapper only says that a step came too early."""
    if has_scheduler(optimizer):
        vars(optimizer).pop("step")


def accumulates(parameter: torch.Tensor) -> bool:
    """Return whether the backward pass that is running adds to a parameter's ``grad``: ``autograd.grad`` does not."""
    node = torch.autograd.graph.get_gradient_edge(parameter).node
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:  # raised for a leaf whose gradient autograd.grad returns
        return False


ACCELERATE_ATTRIBUTES = ("_original_forward", "_is_accelerate_prepared")
"""Attributes that ``Accelerator.prepare`` leaves on a model beside a replaced ``forward``."""


def accelerate_states(*, process: bool) -> list[dict[str, Any]]:
    """Return the dictionaries that all Accelerators of a process share: their public reset cannot be undone.

    ``process``: with the state of the process group.
    """
    from accelerate.state import AcceleratorState, GradientState, PartialState

    return [kind._shared_state for kind in (AcceleratorState, GradientState, *([PartialState] if process else []))]


def prepared_objects(accelerator: Any) -> list[list[Any]]:
    """Return the lists of models and optimizers an Accelerator has prepared: it forgets all of them or none."""
    return [accelerator._models, accelerator._optimizers]


def saved_by_node(node: Any, name: str) -> Any:
    """Return an argument, such as ``dim``, that a node of the autograd graph saved; no public name reads it."""
    return getattr(node, f"_saved_{name}")


def note_of(node: Any) -> dict[Any, Any]:
    """Return notes on an operation of the graph that live as long as it: holding the operation would hold tensors."""
    notes: dict[Any, Any] = node.metadata
    return notes


def in_backward() -> bool:
    """Return whether this thread computes gradients: a module that runs now is computed again by a checkpoint."""
    return bool(torch._C._current_graph_task_id() != -1)
