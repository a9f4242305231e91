"""The pull and the updates around an optimizer's step: where they act, and that they act exactly once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from conservtl.plan.plan import Plan
from conservtl.runtime.parameter_index import ParameterIndex
from conservtl.runtime.update_runner import UpdateRunner

__all__ = ["StepHook"]


class StepHook:
    """Runs before and after each step of one optimizer.

    The coupled pull is added to gradients that are unscaled and synchronised: the scaler has done
    both before it steps an ordinary optimizer; a fused one divides the scale out inside its step, and
    says so in ``grad_scale``, by which the pull is then multiplied. With a closure the pull follows
    the closure's backward. The decoupled pull moves the weights at the same moment, unless the step
    is about to be skipped (``found_inf``). Then the plan's updates act, before and after the step.

    Args:
        optimizer: made by ``build_optimizer``: its groups carry ``param_names``.
        plan: strengths.
        frozen: names frozen in the current phase; asked before every step.
        anchor: (name, parameter) -> where it is pulled to, as its row says it is held.
        importance: (name, parameter) -> what weighs the pull of each of its elements, or None.
        placed: an object that is replaced when anchors have to be asked for again.
        updates: the plan's updates.
        check: raises an error where the gradients lack what the plan adds to the loss.
        pull: False leaves the pull to the caller's loss; all else is done all the same.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        plan: Plan,
        frozen: Callable[[], frozenset[str]],
        anchor: Callable[[str, Tensor], Tensor],
        importance: Callable[[str, Tensor], Tensor | None],
        placed: Callable[[], object],
        updates: UpdateRunner,
        check: Callable[[], None],
        pull: bool,
    ) -> None:
        self.optimizer = optimizer
        self.frozen = frozen
        self.updates = updates
        self._check = check if plan.terms else None
        self.members = ParameterIndex(
            optimizer, {row.name: row for row in plan.rows}, frozen, anchor, importance, placed
        )
        self._scaler: GradScaler | None = None
        self._modes = {row.mode for row in plan.rows if row.pull or row.decay} if pull else set()
        self._added: tuple[Any, ...] | None = None  # what the gradients were when the pull was added
        optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_step_post_hook(self._after_step)

    def add(self, scaler: GradScaler | None = None) -> None:
        """Add the coupled pull now; the step then adds nothing. A second call before it does nothing."""
        self._scaler = scaler if scaler is not None and scaler.is_enabled() else None
        if self._scaler is not None:
            self._unscale(self._scaler)
        self.drop_frozen()
        token = self._token()
        if self._added is None or any(a is not b for a, b in zip(self._added, token, strict=True)):
            self._couple(None)
            self._added = self._token()  # gradients that were None have been made meanwhile

    def prepare(self, *, training: bool) -> None:
        """Before a forward pass of the model."""
        self.updates.prepare(self.members.moving, training=training)

    def drop_frozen(self) -> None:
        """Forget gradients of parameters that this phase does not train."""
        frozen = self.frozen()
        if not frozen:
            return
        for name, parameter, _ in self.members:
            if name in frozen:
                parameter.grad = None

    def _before_step(
        self, _: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._act()
            return None

        def followed() -> Any:
            loss = closure()
            self._act()
            return loss

        return (args[0], followed, *args[2:]), {k: v for k, v in kwargs.items() if k != "closure"}

    def _act(self) -> None:
        self.drop_frozen()
        if self._check is not None and any(parameter.grad is not None for _, parameter, _ in self.members):
            self._check()
        added, self._added = self._added, None
        skip, scale = (getattr(self.optimizer, name, None) for name in ("found_inf", "grad_scale"))
        if added is None or added[0] is not self._state():  # none yet, or in a step that the scaler skipped
            self._couple(scale)
        self.updates.act("before", self.members.moving, skip, scale)  # first: it may set the rate that the pull goes by
        if "decoupled" in self._modes:
            for pull in self.members.pulls("decoupled"):
                pull.move(self.updates.number, skip)

    def _after_step(self, *_: Any) -> None:
        self.updates.act("after", self.members.moving, getattr(self.optimizer, "found_inf", None))
        self.updates.number += 1

    def _couple(self, scale: Tensor | None) -> None:
        """What is done to complete gradients, once a step."""
        self.updates.act("gradients", self.members.moving, scale=scale)
        if "coupled" in self._modes:
            sign = -1.0 if self.optimizer.param_groups[0].get("maximize") else 1.0
            for pull in self.members.pulls("coupled"):
                pull.couple(self.updates.number, scale, sign)

    def _unscale(self, scaler: GradScaler) -> None:
        state = self._state()
        if state is not None and state["stage"].name == "READY":
            scaler.unscale_(self.optimizer)

    def _state(self) -> dict[str, Any] | None:
        """The scaler's notes on this step, a new object after each ``update()``."""
        if self._scaler is None:
            return None
        return self._scaler._per_optimizer_states[id(self.optimizer)]  # noqa: SLF001 - no public way to ask

    def _token(self) -> tuple[Any, ...]:
        """Objects that are replaced when a new step begins: the scaler's state and the gradients.

        A scaler that skips a step never calls it, so only they tell that the pull must be added again.
        """
        return (self._state(), *(parameter.grad for _, parameter, _ in self.members))
