"""The plan's updates: at which moment of a step each acts, and the state they keep."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from conservtl.plan.update import Moving, Step, Update

__all__ = ["UpdateRunner"]

Members = Callable[[Update], list[Moving]]


class UpdateRunner:
    """Runs updates and counts steps.

    Args:
        updates: of the plan; they act by their precedence.
    """

    def __init__(self, updates: tuple[Update, ...]) -> None:
        self.updates = tuple(sorted(updates, key=lambda update: (type(update).precedence, update.name)))
        self.number = 0
        self.state: dict[str, dict[str, Tensor]] = {update.name: {} for update in updates}

    @property
    def listens(self) -> bool:
        """Whether some update wants to act before each forward pass."""
        return any(update.forward for update in self.updates)

    @torch.no_grad()
    def act(
        self,
        moment: Literal["gradients", "before", "after"],
        members: Members,
        skip: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> None:
        """One moment of a step, for all updates."""
        for update in reversed(self.updates) if moment == "after" else self.updates:
            if getattr(type(update), moment) is not getattr(Update, moment):
                step = Step(members(update), self.number, skip, scale)
                getattr(update, moment)(step, self.state[update.name])

    @torch.no_grad()
    def prepare(self, members: Members, *, training: bool) -> None:
        """Before a forward pass."""
        for update in self.updates:
            if update.forward:
                update.prepare(Step(members(update), self.number), self.state[update.name], training)

    def state_dict(self) -> dict[str, Any]:
        """The number of steps done, and what each update remembers."""
        return {"number": self.number, "state": {name: dict(state) for name, state in self.state.items()}}

    def load_state_dict(self, found: Mapping[str, Any]) -> None:
        """Take up what ``state_dict`` gave."""
        self.number = int(found["number"])
        self.state = {update.name: dict(found["state"].get(update.name, {})) for update in self.updates}
