"""The plan's updates in a step, and the state they keep."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from conservtl.plan.update import Moving, NamingFresh, Step, Update

__all__ = ["UpdateRunner"]

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
