"""Mixout: forward passes with a random part of the weights at the source's values."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from conservtl.conserve.toward import placed
from conservtl.decision import Step, Update

__all__ = ["Mixed"]

_PLAIN, _KEPT = "plain:", "kept:"


class Mixed(Update):
    """w0 + M (w - w0) / (1 - p) in place of w, from a training forward pass to the gradients."""

    kind: Literal["mixout"] = "mixout"
    p: Annotated[float, Field(ge=0, lt=1)]
    """Share of the elements that are the source's."""
    seed: Annotated[int, Field(ge=0)]
    """Of the masks; the mask of a step depends on it and on the step's number alone, so every process draws the same
    and a resumed run goes on with them."""

    forward: ClassVar[bool] = True

    def describe(self) -> str:
        """One line for the plan's table."""
        return f"{self.p:g} of the elements of {len(self.names)} parameters at the source's values, drawn anew"

    def prepare(self, step: Step, state: dict[str, Tensor], training: bool) -> None:
        """Mix for a training pass, unless they are mixed; put the plain weights back for any other."""
        if not training:
            _restore(step, state)
            return
        generators: dict[torch.device, torch.Generator] = {}
        for item in step.moving if self.p else ():
            if item.anchor is None or _PLAIN + item.name in state:
                continue
            weight, anchor = item.parameter, placed(item.anchor, item.parameter)
            if _KEPT + item.name not in state:
                if weight.device not in generators:
                    generators[weight.device] = torch.Generator(weight.device)
                    generators[weight.device].manual_seed(self.seed * 1_000_003 + step.number)
                drawn = torch.empty_like(weight).uniform_(generator=generators[weight.device])
                state[_KEPT + item.name] = drawn < 1 - self.p  # a fifth of bernoulli_'s time
            state[_PLAIN + item.name] = weight.clone()
            kept = state[_KEPT + item.name].to(weight.device)
            weight.copy_(anchor + (weight - anchor) * kept / (1 - self.p))

    def gradients(self, step: Step, state: dict[str, Tensor]) -> None:
        """Put the plain weights back, and make the gradients theirs: those of the mixed weights times M / (1 - p)."""
        _restore(step, state)
        for item in step.moving:
            kept = state.pop(_KEPT + item.name, None)
            if kept is not None and item.parameter.grad is not None:
                item.parameter.grad.mul_(kept.to(item.parameter.device) / (1 - self.p))


def _restore(step: Step, state: dict[str, Tensor]) -> None:
    for item in step.moving:
        plain = state.pop(_PLAIN + item.name, None)
        if plain is not None:
            item.parameter.copy_(plain)
