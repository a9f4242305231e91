"""Mixout: dropout whose zero is the source."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from conservtl.kernels.deviation import placed
from conservtl.methods.base import Strategy
from conservtl.plan.decision import Step, Update
from conservtl.plan.plan import Plan

__all__ = ["Mixout", "MixoutUpdate"]


_PLAIN, _KEPT = "plain:", "kept:"
_LEVELS = 1 << 16  # a mask's element costs 16 random bits: a fifth of the time that a random number costs


class MixoutUpdate(Update):
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


class Mixout(Strategy):
    r"""Train with a random part of the weights at the source's values.

    Forward passes in train mode and with gradients see

    .. math:: \frac{(1 - M) \odot w^0 + M \odot w - p\,w^0}{1 - p} = w^0 + \frac{M \odot (w - w^0)}{1 - p}, \qquad
        M \sim \operatorname{Bernoulli}(1 - p)

    whose mean over masks is w; all others see w. A mask has an element for each of a parameter's, and is drawn anew for
    every step of the optimizer: all forward passes of one step, accumulated batches included, share it, and so do all
    processes. p = 0 is plain training to the bit. It acts as an L2 pull toward the source whose strength grows with p
    and with the loss's curvature; it depends on neither the batch size nor the rate.

    From the forward pass to the step the model holds the mixed weights. Saving or evaluating it in between puts the
    plain ones back; ``adaptation.restore_weights()`` does so too. A pull toward the source goes by the plain weights;
    only ``penalty()`` as a term of a loop's own loss sees the mixed ones.

    Measured with its defaults against plain fine-tuning at 1e-4, in points of the harmonic mean of both domains, for a
    new speaker with one and five recordings a word and for corrupted images: +0.1 ± 0.4, +0.2 ± 0.3 and +0.0 ± 0.7
    (benchmarks/results/methods.md).

    Cost: memory for the weights once more and for the masks between forward pass and step; six passes over the
    weights, and the masks to draw. Not for sharded parameters.

    Reference:
        Lee, Cho and Kang 2020, "Mixout: effective regularization to finetune large-scale pretrained language models",
        equation 4.
    """

    kind: Literal["mixout"] = "mixout"
    p: Annotated[float, Field(ge=0, lt=1)] = 0.7
    """Share of the elements at the source's values, to 1/65,536."""
    on: Literal["weights", "all"] = "weights"
    """weights: two dimensions or more and not owned by a norm. all: biases and norms too."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Of the masks."""

    def apply(self, plan: Plan) -> Plan:
        """Add the update."""
        names = tuple(
            row.name
            for row in plan.rows
            if row.origin == "source" and not row.frozen and (self.on == "all" or row.kind == "weight")
        )
        return plan.with_update(MixoutUpdate(by=self.label, names=names, p=self.p, seed=self.seed))
