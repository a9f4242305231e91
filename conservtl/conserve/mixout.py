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
_LEVELS = 1 << 16  # a mask's element costs 16 random bits: a fifth of the time that a random number costs


class Mixed(Update):
    """w0 + M (w - w0) / (1 - p) in place of w, from a training forward pass to the gradients."""

    kind: Literal["mixout"] = "mixout"
    p: Annotated[float, Field(ge=0, lt=1)]
    """Share of the elements that are the source's, to 1/65,536."""
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
                state[_KEPT + item.name] = _mask(weight, self._dropped, generators[weight.device])
            state[_PLAIN + item.name] = weight.clone()
            weight.sub_(anchor).mul_(state[_KEPT + item.name].to(weight.device)).mul_(self._scale).add_(anchor)

    def gradients(self, step: Step, state: dict[str, Tensor]) -> None:
        """Put the plain weights back, and make the gradients theirs: those of the mixed weights times M / (1 - p)."""
        _restore(step, state)
        for item in step.moving:
            kept = state.pop(_KEPT + item.name, None)
            if kept is not None and item.parameter.grad is not None:
                item.parameter.grad.mul_(kept.to(item.parameter.device)).mul_(self._scale)

    @property
    def _dropped(self) -> int:
        """How many of a mask element's levels mean the source's value."""
        return min(round(self.p * _LEVELS), _LEVELS - 1)

    @property
    def _scale(self) -> float:
        return _LEVELS / (_LEVELS - self._dropped)


def _mask(weight: Tensor, dropped: int, generator: torch.Generator) -> Tensor:
    """True where the weight stays, laid out as it is."""
    words = torch.empty(-(-weight.numel() // 4), dtype=torch.int64, device=weight.device)
    levels = words.random_(-(1 << 63), None, generator=generator).view(torch.int16)[: weight.numel()]
    kept = torch.empty_like(weight, dtype=torch.bool, requires_grad=False)
    return torch.ge(levels.view(weight.shape), dropped - _LEVELS // 2, out=kept)


def _restore(step: Step, state: dict[str, Tensor]) -> None:
    for item in step.moving:
        plain = state.pop(_PLAIN + item.name, None)
        if plain is not None:
            item.parameter.copy_(plain)
