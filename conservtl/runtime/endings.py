"""The end of training that a plan asks for, and a warning if a model leaves a training loop without it."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from conservtl.errors import OmissionWarning
from conservtl.plan.plan import Plan

__all__ = ["Endings", "ExportHook", "SaveHook"]


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
