"""Warnings on what a training loop leaves out: the end that a plan asks for, or the adaptation's own optimizer."""

from __future__ import annotations

import warnings
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from conservtl.errors import OmissionWarning
from conservtl.layers import named_parameters
from conservtl.plan.plan import Plan

if TYPE_CHECKING:
    from conservtl.runtime.bound_plan import BoundPlan

__all__ = ["Endings", "ExportHook", "ForeignSteps", "SaveHook", "recognise"]


class Endings:
    """The ``after`` decisions and phases of a plan, which of them are done, and whether a warning was given.

    It knows the plan but no model, so that it outlives the adaptation.
    """

    def __init__(self) -> None:
        self.done: dict[str, Any] = {}
        """Name of each ``after`` decision that was carried out -> its facts."""
        self._plan: Plan | None = None
        self._reached = 0  # the last phase that was started
        self._steps = 0  # since adapt, or since a copy was made
        self._kept_at = -1  # the step at which an optimizer's state was saved
        self._told = False

    def bind(self, plan: Plan) -> None:
        """Begin with a plan."""
        self._plan, self._reached, self.done = plan, 0, {}

    @property
    def complete(self) -> bool:
        """Whether all is done, or there is nothing to do."""
        return not self._missing()

    def started(self, phase: int) -> None:
        """Note that a phase was started."""
        self._reached = max(self._reached, phase)

    def stepped(self) -> None:
        """Note that weights were trained: what was done at an earlier end is due again."""
        self._steps += 1
        if self.done:
            self.done = {}

    def checkpointed(self) -> None:
        """Note that an optimizer's state was saved: what is saved at this step is there to go on from."""
        self._kept_at = self._steps

    def leave_out(self) -> None:
        """Give no warning from now on: an end is left out on purpose."""
        self._told = True

    @contextmanager
    def in_good_hands(self) -> Iterator[None]:
        """Give no warning inside the block, and none later about what it left out on purpose or by an error."""
        told, self._told = self._told, True
        yield
        self._told = told or not self.complete

    def saved(self) -> None:
        """Warn if endings are due in a model that was saved without the optimizer's state."""
        if self._steps and self._kept_at != self._steps:
            self._warn("the adapted model was saved", " A checkpoint to go on from has the optimizer's state too.")

    def exported(self) -> None:
        """Warn if endings are due in a model that was exported or merged."""
        if self._steps or (self._plan is not None and not self._plan.trained):
            self._warn("the adapted model was exported")

    def finished(self) -> None:
        """Warn if phases were never started when all that follows training was carried out."""
        if self._steps:
            self._warn("adaptation.finish(...) was called")

    def deleted(self) -> None:
        """Warn if endings are due in an adaptation that is no longer there."""
        if self._steps:
            self._warn("the adaptation was deleted")

    def _missing(self) -> list[str]:
        """Return a clause for each ending that is not done."""
        if self._plan is None:
            return []
        phases = self._plan.phases[self._reached + 1 :]
        clauses = (
            [f"phase {phases[0].name!r} was never started: call start_phase({self._reached + 1})"] if phases else []
        )
        due = [after.by for after in self._plan.after if after.name not in self.done]
        return [*clauses, *([f"{', '.join(due)} was not carried out: call adaptation.finish(...)"] if due else [])]

    def _warn(self, event: str, hint: str = "") -> None:
        missing = self._missing()
        if missing and not self._told:
            self._told = True
            warnings.warn(f"{event}, but {'; '.join(missing)}.{hint}", OmissionWarning, stacklevel=3)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_steps": 0, "_kept_at": -1}


class ExportHook:
    """Forward pre-hook that notices an export. A copy, in a copied model, does nothing."""

    def __init__(self, endings: Endings | None) -> None:
        self._endings = endings

    def __call__(self, _: nn.Module, *__: Any) -> None:
        """Tell the endings if the forward pass is traced for an export."""
        if torch.compiler.is_dynamo_compiling() or self._endings is None:
            return
        if torch.compiler.is_exporting() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            self._endings.exported()

    def __deepcopy__(self, _: Any) -> ExportHook:
        return ExportHook(None)

    def __reduce__(self) -> Any:
        if self._endings is not None:
            self._endings.saved()  # with the model, as a whole
        return ExportHook, (None,)


class SaveHook:
    """Hook after ``state_dict()`` that notices when what it returned is saved. A copy does nothing."""

    def __init__(self, endings: Endings | None) -> None:
        self._endings = endings

    def __call__(self, _: nn.Module, __: Any, ___: str, metadata: dict[str, Any]) -> None:
        """Put a mark into the metadata, where it is pickled with the tensors."""
        if self._endings is not None:
            metadata["conservtl"] = _Mark(self._endings)

    def __deepcopy__(self, _: Any) -> SaveHook:
        return SaveHook(None)

    def __reduce__(self) -> Any:
        return SaveHook, (None,)


class _Mark:
    """An object in the metadata of a state dict that notices when it is pickled; an empty dictionary in the file."""

    def __init__(self, endings: Endings) -> None:
        self._endings = endings

    def __deepcopy__(self, _: Any) -> _Mark:
        return self

    def __reduce__(self) -> Any:
        self._endings.saved()
        return OrderedDict, ()


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

    def __init__(self, adapted: BoundPlan) -> None:
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
