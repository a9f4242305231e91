"""Mixout: dropout toward the source weights instead of zero."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from conservtl.bounds import NonNegativeInt, ProperShare
from conservtl.compat import foreach_copy_
from conservtl.errors import counted
from conservtl.kernels.backend import split
from conservtl.kernels.deviation import placed
from conservtl.kernels.philox import identity, words
from conservtl.methods._rows import Coverage, source_parameters
from conservtl.methods.base import Span, Strategy, TestFields
from conservtl.plan.plan import Plan
from conservtl.plan.update import Moving, Step, Update

if TYPE_CHECKING:
    from conservtl.kernels.fused.mixing import Mixing
    from conservtl.kernels.fused.moves import Moves

__all__ = ["Mixout", "MixoutUpdate"]

_PLAIN, _MASK = "plain:", "kept:"  # prefixes of keys in the update's state, saved with it
_LEVELS = 1 << 16  # 16 random bits an element of a mask: a fifth of the time that a random float costs


class Mixout(Strategy):
    r"""Train with a random part of the weights at their source values.

    Forward passes in train mode and with gradients see

    .. math:: \frac{(1 - M) \odot w^0 + M \odot w - p\,w^0}{1 - p} = w^0 + \frac{M \odot (w - w^0)}{1 - p}, \qquad
        M \sim \operatorname{Bernoulli}(1 - p)

    whose mean over masks is w; all other passes see w. A mask has one element for each element of a parameter and is
    drawn for each step of the optimizer: all forward passes of one step, accumulated batches included, share it, and
    so do all processes. p = 0 is plain training to the bit. Mixout acts as an L2 pull toward the source that grows
    with p and with the curvature of the loss; it depends on neither the batch size nor the learning rate.

    The model holds the mixed weights from the forward pass to the step. Saving or evaluating it in between restores
    the plain ones, and so does ``adaptation.restore_weights()``. Penalties use the plain weights; only ``penalty()``
    as a term of your own loss sees the mixed ones.

    Measured: docs/methods.md.

    Cost: memory for a second copy of the weights and for the masks between forward pass and step; six passes over the
    weights a step, and drawing the masks. Sharded parameters are refused.

    Hurts: where steps must be quick: masks are drawn for all weights; and on little data many steps see weights
    that are not those evaluated.

    Reference:
        Lee, Cho and Kang 2020, "Mixout: effective regularization to finetune large-scale pretrained language models",
        equation 4.

    Example:
        >>> import torch, conservtl as ctl
        >>> model = torch.nn.Linear(4, 1, bias=False)
        >>> adaptation = ctl.adapt(model, {"weight": torch.zeros(1, 4)}, [ctl.Mixout(p=0.5)])
        >>> optimizer = adaptation.optimizer(torch.optim.SGD, lr=0.1)
        >>> with torch.no_grad():
        ...     _ = model.weight.fill_(1.0)
        >>> _ = model(torch.ones(1, 4))  # half of the weights at the source's 0, the others twice as far from it
        >>> sorted(set(model.weight.flatten().tolist()))
        [0.0, 2.0]
        >>> adaptation.restore_weights()
        >>> model.weight.tolist()
        [[1.0, 1.0, 1.0, 1.0]]
    """

    kind: Literal["mixout"] = "mixout"
    test_fields: ClassVar[TestFields] = ({"p": Span(0, 0.9)},)
    p: ProperShare = 0.7
    """Share of the elements at their source values, rounded to 1/65,536."""
    on: Coverage = "weights"
    """weights: parameters of two dimensions or more that no norm owns. all: biases and norms too."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of the masks."""

    def apply(self, plan: Plan) -> Plan:
        """Add the update."""
        names = source_parameters(plan, self.on)
        return plan.with_update(MixoutUpdate(by=self.label, names=names, p=self.p, seed=self.seed))


class MixoutUpdate(Update):
    """w0 + M (w - w0) / (1 - p) in place of w, from a forward pass in train mode to the gradients."""

    kind: Literal["mixout"] = "mixout"
    precedence: ClassVar[int] = -10
    p: ProperShare
    """Share of the elements at their source values, rounded to 1/65,536."""
    seed: NonNegativeInt
    """Seed of the masks. A mask depends on it, on the number of the step and on the parameter: every process draws the
    same, and a resumed run continues with the same masks. On a GPU each program draws its masks by a counter, again for
    the gradients, and stores none; on a CPU that costs many times torch's generator, which draws other masks."""

    forward: ClassVar[bool] = True

    def describe(self) -> str:
        """Return one line for the plan's table."""
        return (
            f"{self.p:g} of the elements of {counted(len(self.names), 'parameter')} at source values, drawn for "
            "each step"
        )

    def prepare(self, step: Step, state: dict[str, Tensor], training: bool) -> None:
        """Mix the weights for a pass in train mode, unless they are mixed; restore them for any other."""
        if not training:
            _restore(step, state)
            return
        moves, rest = self._split(step, state)
        if moves is not None and self.p:
            for mixing in moves.mixing:
                self._mix(mixing, step, state)
        generators: dict[torch.device, torch.Generator] = {}
        for item in rest if self.p else ():
            if item.anchor is None or _PLAIN + item.name in state:
                continue
            weight, anchor = item.parameter, placed(item.anchor, item.parameter)
            if _MASK + item.name not in state:
                if weight.device not in generators:
                    generators[weight.device] = torch.Generator(weight.device)
                    generators[weight.device].manual_seed(self.seed * 1_000_003 + step.number)
                state[_MASK + item.name] = _draw_mask(weight, self._dropped, generators[weight.device])
            state[_PLAIN + item.name] = weight.clone()
            weight.sub_(anchor).mul_(self._mask(item, step, state)).mul_(self._scale).add_(anchor)

    def gradients(self, step: Step, state: dict[str, Tensor]) -> None:
        """Restore the plain weights, and turn the gradients into theirs: multiply by M / (1 - p)."""
        if not state:
            return
        moves, rest = self._split(step, state)
        for mixing in [] if moves is None else moves.mixing:
            self._unmix(mixing, step, state)
        _restore(step, state)
        for item in rest:
            gradient = item.parameter.grad
            if _MASK + item.name in state and gradient is not None:
                plain = gradient.clone() if item.new is not None else gradient
                gradient.mul_(self._mask(item, step, state)).mul_(self._scale)
                if item.new is not None:  # new rows were not mixed
                    gradient.copy_(torch.where(item.new, plain, gradient))
            state.pop(_MASK + item.name, None)

    def _split(self, step: Step, state: Mapping[str, Tensor]) -> tuple[Moves | None, Sequence[Moving]]:
        """Return the parameters whose masks a program draws, and the rest."""
        moves, rest = split(step.moving, new=False)
        masks = map(state.get, _keys(step.moving, _MASK)) if moves is not None else ()
        drawn = next((mask for mask in masks if mask is not None and mask.dtype == torch.bool), None)
        return (moves, rest) if drawn is None else (None, step.moving)  # by the CPU's generator, before resuming here

    def _mix(self, mixing: Mixing, step: Step, state: dict[str, Tensor]) -> None:
        """Mix weights unless they are mixed."""
        plain_keys = _keys(mixing, _PLAIN)
        if all(map(state.__contains__, plain_keys)):
            return
        _restore(step, state)
        plain = mixing.mix(self.seed, step.number, self._dropped)
        state.update(zip(plain_keys, plain.values(), strict=True))
        state.update(dict.fromkeys(_keys(mixing, _MASK), torch.empty(0, dtype=torch.int16)))

    def _unmix(self, mixing: Mixing, step: Step, state: dict[str, Tensor]) -> None:
        """Multiply gradients by their masks, and put plain weights back if all are in the memory of the program."""
        plains = mixing.plains
        restored = all(state.get(key) is one for key, one in zip(_keys(mixing, _PLAIN), plains, strict=True))
        mixed = [state.pop(key, None) is not None for key in _keys(mixing, _MASK)]
        if any(mixed):
            which = None if all(mixed) else mixed
            mixing.unmix(which, self.seed, step.number, self._dropped, restored=restored)
            for key in _keys(mixing, _PLAIN) if restored else ():
                del state[key]

    def _mask(self, item: Moving, step: Step, state: Mapping[str, Tensor]) -> Tensor:
        """Return the mask of a parameter in this step; drawn again if it was drawn by a program."""
        mask, weight = state[_MASK + item.name], item.parameter
        if mask.dtype == torch.bool:
            return mask.to(weight.device)
        levels = words(weight.numel(), self.seed, step.number, identity(item.name), weight.device) >> 16
        found = torch.empty_like(weight, dtype=torch.bool, requires_grad=False)
        order = sorted(range(weight.ndim), key=weight.stride, reverse=True)  # elements are counted as in memory
        flat = found.permute(order).view(-1)
        flat.copy_(levels >= self._dropped)
        return found

    @property
    def _dropped(self) -> int:
        """Number of a mask element's levels that mean the source value."""
        return min(round(self.p * _LEVELS), _LEVELS - 1)

    @property
    def _scale(self) -> float:
        return _LEVELS / (_LEVELS - self._dropped)


def _draw_mask(weight: Tensor, dropped: int, generator: torch.Generator) -> Tensor:
    """Return a mask, true for the elements that keep their value, in the memory layout of the weight."""
    words = torch.empty(-(-weight.numel() // 4), dtype=torch.int64, device=weight.device)
    levels = words.random_(-(1 << 63), None, generator=generator).view(torch.int16)[: weight.numel()]
    mask = torch.empty_like(weight, dtype=torch.bool, requires_grad=False)
    return torch.ge(levels.view(weight.shape), dropped - _LEVELS // 2, out=mask)


def _restore(step: Step, state: dict[str, Tensor]) -> None:
    """Restore plain weights if they are mixed."""
    if not state:
        return
    keys = zip(step.moving, _keys(step.moving, _PLAIN), strict=True)
    mixed = [(item.parameter, state.pop(key)) for item, key in keys if key in state]
    if mixed:
        parameters, plains = zip(*mixed, strict=True)
        foreach_copy_(parameters, plains)


def _keys(of: Sequence[Moving] | Mixing, prefix: str) -> list[str]:
    """Return the keys of parameters in the update's state, kept with them from step to step."""
    kept = getattr(of, "kept", {})
    if prefix not in kept:
        names = [item.name for item in of] if isinstance(of, Sequence) else of.names
        kept[prefix] = [prefix + name for name in names]
    keys: list[str] = kept[prefix]
    return keys
