"""Compiled models: checked before training that the compiler can trace them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from conservtl.compat import forget_graphs, guard_hooks
from conservtl.errors import SpecError
from conservtl.layers import canonical
from conservtl.runtime.model_hooks import hooked
from conservtl.runtime.preserve import eval_mode

__all__ = ["GRAPHS", "check_traceable", "compiled"]

GRAPHS = frozenset({"reduce-overhead", "max-autotune"})
"""Modes whose outputs live in the memory of a CUDA graph until the next forward pass."""

Run = Callable[[nn.Module], Any]


def compiled(model: nn.Module, mode: bool | str) -> nn.Module:
    """Return a model compiled as ``training.compile`` says; itself if not at all."""
    if not mode:
        return model
    made: nn.Module = torch.compile(model, mode=None if mode is True else mode)  # type: ignore[assignment]
    guard_hooks()  # taps were registered before torch loaded its compiler
    return made


def check_traceable(model: nn.Module, run: Run, mode: bool | str, *, whole: bool = True) -> None:
    """Raise unless the compiler traces a model's forward pass as one graph.

    It is tried in eval mode without gradients, in which layers are not left out at random. Weights and gradients stay.

    Unless ``whole``, several graphs are enough, between which a strategy's extensions run.
    """
    with eval_mode(model), torch.no_grad():
        reason = _reason(model, lambda: run(model), whole=whole)
        if reason is None:
            return
        name, module, inner = _culprit(model, run) or ("", model, reason)
    which = f"its module {canonical(name)!r} ({type(module).__name__})" if name else type(module).__name__
    raise SpecError(
        f"training.compile is {str(mode).lower()}, which takes a model that torch.compile traces as one graph; {which} "
        f"cannot be traced: {inner}. Set it to false, or change that module."
    )


def _culprit(model: nn.Module, run: Run) -> tuple[str, nn.Module, str] | None:
    """Return the innermost module whose forward cannot be traced, and why; None if each one alone can."""
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            return name, module, "a scripted module is compiled already"
    calls: dict[nn.Module, tuple[Any, Any]] = {}

    def record(module: nn.Module, args: Any, kwargs: Any) -> None:
        calls.setdefault(module, (args, kwargs))

    with hooked([module.register_forward_pre_hook(record, with_kwargs=True) for module in model.modules()]):
        run(model)
    for name, module in reversed(list(model.named_modules())):  # children before their parents
        if module not in calls or (type(module).__module__.startswith("torch.nn.") and not list(module.children())):
            continue
        args, kwargs = calls[module]
        if (reason := _reason(module, partial(module, *args, **kwargs))) is not None:
            return name, module, reason
    return None


def _reason(module: nn.Module, call: Callable[[], Any], *, whole: bool = True) -> str | None:
    """Return why a module's forward cannot be traced in a call; None if it can."""
    own = module.__dict__.get("forward")
    forget_graphs()  # the compiler gives up on code that it has compiled for many modules
    try:
        module.forward = torch.compile(module.forward, backend="eager", fullgraph=whole)
        call()
    except Exception as error:  # noqa: BLE001 - the compiler has many classes of errors, none of them public
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return lines[0][:200].rstrip(".") if lines else type(error).__name__
    finally:
        module.__dict__.pop("forward", None)
        if own is not None:
            module.forward = own
        forget_graphs()
    return None
