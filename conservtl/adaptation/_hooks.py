"""Hooks on a model that its plan needs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.utils.hooks import RemovableHandle

from conservtl.compat import guard_hooks
from conservtl.layers import unwrap
from conservtl.runtime.endings import ExportHook, SaveHook
from conservtl.runtime.model_hooks import ForwardHook, StateDictHook

if TYPE_CHECKING:
    from conservtl.adaptation.bound_plan import BoundPlan

__all__ = ["attach_hooks"]


def attach_hooks(bound: BoundPlan) -> tuple[RemovableHandle, ...]:
    """Register hooks for updates that act before forward passes, and for an end of training that is left out."""
    model = unwrap(bound.model)
    handles: list[RemovableHandle] = []
    if bound.updates.listens:
        handles.append(model.register_forward_pre_hook(ForwardHook(bound)))
        guard_hooks()
        handles.append(model.register_state_dict_pre_hook(StateDictHook(bound)))  # type: ignore[no-untyped-call]
    if not bound.endings.complete:
        handles.append(model.register_forward_pre_hook(ExportHook(bound.endings)))
        handles.append(model.register_state_dict_post_hook(SaveHook(bound.endings)))  # type: ignore[no-untyped-call]
    return tuple(handles)
