"""The pull and the updates around an optimizer's step: where they act, and that they act exactly once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from conservtl.conserve.pull import Pulled, add_to_gradients, move_weights
from conservtl.conserve.updates import UpdateRunner
from conservtl.decision import Moving, Update
from conservtl.plan import Plan, Row

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
        anchor: (name, parameter) -> where it is pulled to, on its device.
        importance: (name, parameter) -> what weighs the pull of each of its elements, or None.
        updates: the plan's updates.
        pull: False leaves the pull to the caller's loss; all else is done all the same.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        plan: Plan,
        frozen: Callable[[], frozenset[str]],
        anchor: Callable[[str, Tensor], Tensor],
        importance: Callable[[str, Tensor], Tensor | None],
        updates: UpdateRunner,
        pull: bool,
    ) -> None:
        self.optimizer = optimizer
        self.rows: Mapping[str, Row] = {row.name: row for row in plan.rows}
        self.frozen = frozen
        self.anchor = anchor
        self.importance = importance
        self.updates = updates
        self._scaler: GradScaler | None = None
        self._modes = {row.mode for row in plan.rows if row.pull or row.decay}
        self.pull = pull and bool(self._modes)
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
        self.updates.prepare(self._moving, training=training)

    def drop_frozen(self) -> None:
        """Forget gradients of parameters that this phase does not train."""
        frozen = self.frozen()
        if not frozen:
            return
        for name, parameter, _ in self._members():
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
        added, self._added = self._added, None
        skip, scale = (getattr(self.optimizer, name, None) for name in ("found_inf", "grad_scale"))
        if added is None or added[0] is not self._state():  # none yet, or in a step that the scaler skipped
            self._couple(scale)
        if self.pull:
            move_weights(list(self._pulled("decoupled")), skip)
        self.updates.act("before", self._moving, skip, scale)

    def _after_step(self, *_: Any) -> None:
        self.updates.act("after", self._moving, getattr(self.optimizer, "found_inf", None))
        self.updates.number += 1

    def _couple(self, scale: Tensor | None) -> None:
        """What is done to complete gradients, once a step."""
        self.updates.act("gradients", self._moving, scale=scale)
        if self.pull:
            sign = -1.0 if self.optimizer.param_groups[0].get("maximize") else 1.0
            add_to_gradients(list(self._pulled("coupled")), scale, sign)

    def _moving(self, update: Update) -> list[Moving]:
        frozen, wanted = self.frozen(), set(update.names)
        return [
            Moving(
                name,
                parameter,
                self.anchor(name, parameter) if self.rows[name].origin == "source" else None,
                group,
            )
            for name, parameter, group in self._members()
            if name in wanted and name not in frozen and parameter.requires_grad
        ]

    def _pulled(self, mode: str) -> Iterator[Pulled]:
        if mode not in self._modes:
            return
        frozen = self.frozen()
        for name, parameter, group in self._members():
            row = self.rows.get(name)  # a group of the user's own is none of ours
            if row is None or row.mode != mode or not row.covered or name in frozen or not parameter.requires_grad:
                continue
            rate = group["lr"] if mode == "decoupled" else 0.0  # so that one call serves all rates when coupled
            if row.pull:
                strength = row.pull if row.anneal is None else row.pull * row.anneal.factor(self.updates.number)
                anchor, importance = self.anchor(name, parameter), self.importance(name, parameter)
                yield Pulled(parameter, anchor, strength, rate, importance)
            elif row.decay:
                yield Pulled(parameter, None, row.decay, rate)

    def _members(self) -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
        """By name, because what prepares a model for many processes replaces the tensors in the groups."""
        for group in self.optimizer.param_groups:
            for name, parameter in zip(group.get("param_names", ()), group["params"], strict=False):
                yield name, parameter, group

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
        return (self._state(), *(parameter.grad for _, parameter, _ in self._members()))
