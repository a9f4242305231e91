"""The hook around an optimizer's step, in which penalties and updates act exactly once."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from conservtl.compat import scaler_state
from conservtl.errors import SpecError
from conservtl.kernels.backend import capturing
from conservtl.runtime.model_check import check_conversion
from conservtl.runtime.parameter_index import ParameterIndex
from conservtl.runtime.rates_over_time import PhaseRates
from conservtl.runtime.runners import PenaltyRunner

if TYPE_CHECKING:
    from conservtl.runtime.bound_plan import BoundPlan

__all__ = ["StepHook"]


class StepHook:
    """Penalties and updates before and after each step of one optimizer.

    Coupled penalties are added to complete, synchronised gradients. A scaler unscales them before it steps an ordinary
    optimizer. A fused optimizer divides the scale out inside its step and holds it in ``grad_scale``, by which the
    penalties' gradients are then multiplied. With a closure, all this follows the closure's backward. Decoupled
    penalties move the weights at the same time, unless the step will be skipped (``found_inf``).

    Args:
        optimizer: from ``build_optimizer``; its groups carry ``param_names``.
        inner: the optimizer inside it in whose step all this happens, of the same groups; None: it wraps none.
        context: the state of the adaptation, read before every step.
        penalties: False leaves the penalties to the caller's loss.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        context: BoundPlan,
        *,
        inner: torch.optim.Optimizer | None = None,
        penalties: bool = True,
    ) -> None:
        self.optimizer = optimizer
        self._inner = optimizer if inner is None else inner
        self.index = ParameterIndex(self._inner, context)
        self._context = context
        self._penalties = PenaltyRunner(self.index, context) if penalties else None
        self._scaler: GradScaler | None = None
        self._checked = False  # whether the model was found as it was when the optimizer was made
        self._added: tuple[Any, ...] | None = None  # the gradients to which penalties were added
        self.rates = PhaseRates(optimizer)
        self._types, self._places = self._parameter_types(), -1
        for one in dict.fromkeys((optimizer, self._inner)):
            with suppress(AttributeError):  # a wrapper may leave out the constructor of its base class
                one.register_state_dict_pre_hook(lambda _: context.endings.checkpointed())
        self._inner.register_step_pre_hook(self._before_step)
        self._inner.register_step_post_hook(self._after_step)

    @torch.no_grad()
    def add(self, scaler: GradScaler | None = None) -> None:
        """Add the coupled penalties now, so that the step adds nothing. A second call before the step does nothing."""
        self._scaler = scaler if scaler is not None and scaler.is_enabled() else None
        if self._scaler is not None:
            self._unscale(self._scaler)
        with self.index:
            self._check_model()
            self.drop_frozen()
            self._context.anchors.follow()
            token = self._token()
            if self._added is None or any(a is not b for a, b in zip(self._added, token, strict=True)):
                self._couple(None)
                self._added = self._token()  # gradients that were None exist now

    def prepare(self, *, training: bool) -> None:
        """Let updates act before a forward pass of the model."""
        if not self._context.updates.listens:
            return
        with torch.inference_mode(mode=False), self.index:  # anchors placed here serve steps with gradients too
            self._context.anchors.follow()
            self._context.updates.prepare(self.index.moving, training=training)
        torch.clear_autocast_cache()  # the caller's autocast may hold the weights of a pass before

    def drop_frozen(self) -> None:
        """Drop the gradients of parameters that this phase does not train."""
        for parameter in self.index.frozen():
            parameter.grad = None

    def _before_step(
        self, _: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._act()
            return None

        def closure_then_act() -> Any:
            loss = closure()
            self._act()
            return loss

        return (args[0], closure_then_act, *args[2:]), {k: v for k, v in kwargs.items() if k != "closure"}

    def _parameter_types(self) -> list[torch.dtype]:
        return [parameter.dtype for _, parameter, _ in self.index]

    def _check_model(self) -> None:
        """Raise if the model has changed since the optimizer was made: types at each step, all else at the first."""
        if self.index.places != self._places:
            types = self._parameter_types()
            if types != self._types:
                check_conversion((name for name, _, _ in self.index), self._types, types)
            self._types, self._places = types, self.index.places
        if not self._checked:
            self._context.check_model((name, parameter) for name, parameter, _ in self.index)
            self._checked = True

    def _act(self) -> None:
        with self.index:
            self._act_once()
        _begin_momentum(self._inner)

    def _act_once(self) -> None:
        context = self._context
        self._check_model()
        self.rates.check()
        self.drop_frozen()
        if context.plan.terms and any(parameter.grad is not None for _, parameter, _ in self.index):
            context.terms.check_added()
        added, self._added = self._added, None
        context.anchors.follow()
        if not context.plan.penalties and not context.updates.updates:
            return
        self._check_captured()
        skip, scale = getattr(self._inner, "found_inf", None), getattr(self._inner, "grad_scale", None)
        with torch.no_grad():
            if added is None or added[0] is not self._state():  # not yet, or in a step that the scaler skipped
                self._couple(scale)
            context.updates.act("before", self.index.moving, skip, scale)  # it may set the decoupled penalties' rate
            if self._penalties is not None:
                self._penalties.move_weights(skip)

    def _after_step(self, *_: Any) -> None:
        self._context.anchors.follow()
        if self._context.updates.updates:
            with torch.no_grad(), self.index:
                self._context.updates.act("after", self.index.moving, getattr(self._inner, "found_inf", None))
        self._context.updates.number += 1
        self._context.penalty_in_gradients = False
        self._context.endings.stepped()

    def _couple(self, scale: Tensor | None) -> None:
        """Let updates and coupled penalties act on complete gradients, once a step."""
        self._context.updates.act("gradients", self.index.moving, scale=scale)
        if self._penalties is not None:
            if self._context.penalty_in_gradients:
                self._context.penalty_in_gradients = False
                raise SpecError(
                    "penalty() is part of the loss, and the optimizer's step adds the pull too: it would count twice. "
                    "Leave penalty() out of the loss, or make the optimizer with optimizer(..., pull=False)."
                )
            self._penalties.add_gradients(scale, maximize=bool(self._inner.param_groups[0].get("maximize")))

    def _check_captured(self) -> None:
        """Raise if a CUDA graph is captured that would repeat what is decided anew in each step."""
        if not capturing():
            return
        plan = self._context.plan
        hosted = [one for one in plan.penalties if one.anneal is not None or one.every > 1 or one.anchor == "cpu"]
        if by := [one.by for one in (*plan.updates, *hosted)]:
            raise SpecError(
                f"{by[0]} needs the host at each step, and a CUDA graph repeats without it what it captured. Capture "
                "forward and backward pass alone, and call optimizer.step() after each replay."
            )

    def _unscale(self, scaler: GradScaler) -> None:
        state = self._state()
        if state is not None and state["stage"].name == "READY":
            scaler.unscale_(self.optimizer)

    def _state(self) -> dict[str, Any] | None:
        """Return the scaler's record of this step, a new object after each ``update()``."""
        if self._scaler is None:
            return None
        return scaler_state(self._scaler, self.optimizer)

    def _token(self) -> tuple[Any, ...]:
        """Return objects that are replaced when a new step begins: the scaler's record and the gradients.

        A scaler that skips a step never calls the hook, so only these objects show that penalties must be added again.
        """
        return (self._state(), *(parameter.grad for _, parameter, _ in self.index))


def _begin_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Give a momentum of zero to parameters that get their first gradient, as torch's fused SGD takes all or none.

    Without dampening a step from zero equals the first step, which copies the gradient. Other optimizers are left
    alone.
    """
    if type(optimizer) is not torch.optim.SGD:
        return
    for group in optimizer.param_groups:
        if not group["fused"] or not group["momentum"] or group["dampening"]:
            continue
        moving = [one for one in group["params"] if one.grad is not None]
        fresh = [one for one in moving if optimizer.state[one].get("momentum_buffer") is None]
        if len(fresh) < len(moving):
            for parameter in fresh:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
