"""The plan's penalties and updates in a step: annealed, signed, in order, with the state that updates keep."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from conservtl.compat import accumulates
from conservtl.kernels.deviation import together
from conservtl.kernels.dtensor import local, over_parts, sharded, whole
from conservtl.kernels.gradient import as_handed
from conservtl.plan.penalty import Penalty
from conservtl.plan.update import Moving, NamingFresh, Step, Update
from conservtl.runtime.parameter_index import ParameterIndex, penalised

if TYPE_CHECKING:
    from conservtl.runtime.bound_plan import BoundPlan

__all__ = ["PenaltyRunner", "UpdateRunner", "total_penalty"]


class PenaltyRunner:
    """The plan's penalties on the parameters of one optimizer; called without gradients."""

    def __init__(self, index: ParameterIndex, context: BoundPlan) -> None:
        self._index, self._context = index, context

    def add_gradients(self, scale: Tensor | None, *, maximize: bool) -> None:
        """Add the coupled penalties to complete gradients, once a step."""
        for penalty in self._context.plan.penalties:
            factor = self._factor_now(penalty)
            if penalty.mode == "coupled" and factor:
                for kernel in self._index.kernels(penalty):
                    kernel.add_gradients(-factor if maximize else factor, scale)

    def move_weights(self, skip: Tensor | None) -> None:
        """Move weights by the decoupled penalties."""
        for penalty in self._context.plan.penalties:
            factor = self._factor_now(penalty)
            if penalty.mode == "decoupled" and factor:
                self._context.anchors.follow()  # an earlier penalty may have moved them
                for kernel in self._index.kernels(penalty):
                    kernel.move_weights(factor, skip)

    def _factor_now(self, penalty: Penalty) -> float:
        """Return the annealing's factor, or 0 if the penalty does not act in this step."""
        due = (self._context.updates.number + 1) % penalty.every == 0
        return _factor(penalty, self._context) if due else 0.0


def total_penalty(context: BoundPlan, parameters: Mapping[str, nn.Parameter]) -> Tensor:
    """Return the sum of the penalties' values on what is trained now, a scalar with gradient.

    The context is told when its gradient is added to those of the parameters. If parameters are sharded, all processes
    call it together.
    """
    values: list[Tensor] = []
    for penalty in context.plan.penalties:
        names = [name for name in penalty.names if name not in context.frozen]
        moving = [penalised(penalty, context, context.plan[name], parameters[name], {}) for name in names]
        context.anchors.follow()
        if moving:
            values.append(_factor(penalty, context) * _value(penalty, moving))
            leaf = moving[0].parameter
    if not values:
        return torch.zeros((), device=next(iter(parameters.values())).device, requires_grad=True)
    total = together(values).sum()
    if total.requires_grad and not torch.compiler.is_compiling():
        total.register_hook(lambda gradient: _note(context, leaf, gradient))  # type: ignore[no-untyped-call]
    return total


def _note(context: BoundPlan, parameter: Tensor, gradient: Tensor) -> None:
    """Note that a penalty's gradient is added to that of a parameter, and not only returned by ``autograd.grad``."""
    context.penalty_in_gradients |= bool(gradient) and accumulates(parameter)


def _value(penalty: Penalty, moving: Sequence[Moving]) -> Tensor:
    """Return the value of a penalty: on whole parameters, or the sum over this process's parts and those of others."""
    if penalty.sums_over not in ("elements", "rows"):
        return _value_of(penalty, [as_handed(item, whole) for item in moving])
    alike: dict[Any, list[Moving]] = {}
    for item in moving:
        parameter: Any = item.parameter
        cut = (parameter.device_mesh, tuple(parameter.placements)) if sharded(parameter) else None
        alike.setdefault(cut, []).append(item)
    total = torch.zeros((), device=moving[0].parameter.device)
    for items in alike.values():
        part = _value_of(penalty, [as_handed(item, local) for item in items])
        others = over_parts(part.detach().reshape(1), [items[0].parameter])[0] - part.detach()  # without gradient
        total = total + (part + others).to(total.device)
    return total


def _value_of(penalty: Penalty, moving: Sequence[Moving]) -> Tensor:
    with NamingFresh(penalty, moving):
        return penalty.value(moving)


def _factor(penalty: Penalty, context: BoundPlan) -> float:
    """Return the annealing's factor at this step."""
    return 1.0 if penalty.anneal is None else penalty.anneal.factor(context.updates.number)


Lookup = Callable[[Update], list[Moving]]
"""From an update to its parameters that are trained now."""


class UpdateRunner:
    """Runs updates and counts steps."""

    def __init__(self, updates: tuple[Update, ...]) -> None:
        self.updates = tuple(sorted(updates, key=lambda update: (type(update).precedence, update.name)))
        self.number = 0
        self.state: dict[str, dict[str, Tensor]] = {update.name: {} for update in updates}

    @property
    def listens(self) -> bool:
        """Whether an update acts before each forward pass."""
        return any(update.forward for update in self.updates)

    def act(
        self,
        moment: Literal["gradients", "before", "after"],
        moving: Lookup,
        skip: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> None:
        """Call the method ``moment`` of all updates, without gradients."""
        for update in reversed(self.updates) if moment == "after" else self.updates:
            if getattr(type(update), moment) is not getattr(Update, moment):
                step = Step(moving(update), self.number, skip, scale)
                with NamingFresh(update, step.moving):
                    getattr(update, moment)(step, self.state[update.name])

    @torch.no_grad()
    def prepare(self, moving: Lookup, *, training: bool) -> None:
        """Let updates act before a forward pass."""
        for update in self.updates:
            if update.forward:
                step = Step(moving(update), self.number)
                with NamingFresh(update, step.moving):
                    update.prepare(step, self.state[update.name], training)

    def state_dict(self) -> dict[str, Any]:
        """Return the number of steps done and the state of each update."""
        return {"number": self.number, "state": {name: dict(state) for name, state in self.state.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state that ``state_dict`` returned."""
        self.number = int(state["number"])
        self.state = {update.name: dict(state["state"].get(update.name, {})) for update in self.updates}
