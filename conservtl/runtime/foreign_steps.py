"""Steps of optimizers that an adaptation did not make, which carry out nothing of its plan."""

from __future__ import annotations

import warnings
import weakref
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from conservtl.errors import OmissionWarning
from conservtl.layers import named_parameters
from conservtl.plan.plan import Plan
from conservtl.runtime.step_context import StepContext

__all__ = ["ForeignSteps", "recognise"]

_LIMIT = 3
"""Steps in a row: an optimizer inside another, or one that moves weights and moves them back, makes fewer."""
_watching: weakref.WeakSet[ForeignSteps] = weakref.WeakSet()
_own: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
_registered: list[bool] = []  # once it is: removed in a step, it would disturb those after it


class ForeignSteps:
    """Counts the steps in a row that other optimizers make on parameters that a plan trains, and warns once.

    One hook after the steps of all optimizers of the process sees them: a hook on the model's forward pass would sit in
    compiled graphs, and could not tell a step from an accumulated batch.
    """

    def __init__(self, adapted: StepContext) -> None:
        self._adapted = weakref.ref(adapted)
        self._count, self._number, self._told = 0, 0, False
        self._trains: weakref.WeakKeyDictionary[torch.optim.Optimizer, bool] = weakref.WeakKeyDictionary()
        _watching.add(self)
        if not _registered:
            register_optimizer_step_post_hook(_after_step)
            _registered.append(True)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Count a step of another optimizer."""
        adapted = self._adapted()
        if adapted is None:
            return
        if optimizer not in self._trains:
            trained = set(map(id, map(named_parameters(adapted.model).get, adapted.plan.trained)))
            self._trains[optimizer] = any(id(p) in trained for group in optimizer.param_groups for p in group["params"])
        if not self._trains[optimizer]:
            return
        adapted.endings.stepped()
        if adapted.updates.number != self._number:
            self._number, self._count = adapted.updates.number, 0
        self._count += 1
        if self._count == _LIMIT and not self._told and (lost := _lost(adapted.plan)):
            self._told = True
            warnings.warn(
                f"{type(optimizer).__name__} has trained the adapted model for {_LIMIT} steps, and no optimizer of the "
                f"adaptation has: {', '.join(lost)} did not act. Make it with adaptation.optimizer("
                f"{type(optimizer).__name__}, ...); torch drops the hooks of one that is copied.",
                OmissionWarning,
                stacklevel=4,  # the line that calls the optimizer's step
            )


def recognise(optimizer: torch.optim.Optimizer) -> None:
    """Note that an adaptation made an optimizer."""
    _own.add(optimizer)


def _after_step(optimizer: torch.optim.Optimizer, _: Any, __: Any) -> None:
    if optimizer in _own:
        return
    for watch in tuple(_watching):
        watch.step(optimizer)


def _lost(plan: Plan) -> list[str]:
    """Return the strategies that act in the step or the groups of an optimizer."""
    acting = [decision.by for decisions in (plan.penalties, plan.updates) for decision in decisions]
    rates = [plan[name].chosen["rate"].by for name in plan.trained if "rate" in plan[name].chosen]
    return list(dict.fromkeys([*acting, *rates]))
