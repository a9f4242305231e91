"""Auto-RGN: rates from relative gradient norms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from conservtl.kernels.deviation import TINY, norms, together
from conservtl.kernels.dtensor import local
from conservtl.methods.base import Order, Strategy
from conservtl.plan.decision import Moving, Step, Update
from conservtl.plan.plan import Plan

__all__ = ["AutoRGN", "AutoRGNUpdate"]


_SHARE, _OWN = "share", "own_lr"


class AutoRGNUpdate(Update):
    """Each layer's rate times its share: |g| / |w|, over the largest of any layer.

    The share stands in the optimizer's groups, and is saved with them; it acts on the rate during the step alone, so
    that schedulers and phases go on with rates that are theirs.
    """

    kind: Literal["auto_rgn"] = "auto_rgn"
    every: Annotated[int, Field(ge=1)]
    """Steps from one decision to the next; the one moment at which the host waits for the device."""
    floor: Annotated[float, Field(ge=0, le=1)] = 0.0
    """The smallest share."""

    layered: ClassVar[bool] = True
    anchors: ClassVar[bool] = False
    shards: ClassVar[bool] = True

    def describe(self) -> str:
        """One line for the plan's table."""
        return f"rate × relative gradient norm of each layer, decided every {self.every} steps"

    def gradients(self, step: Step, state: dict[str, Tensor]) -> None:
        """Add this step's ratios to their sums; a step with gradients that are not finite does not count."""
        layers = _by_layer(step.moving)
        if not layers:
            return
        items = [item for own in layers.values() for item in own]
        of = [item.parameter for item in items]
        weights = [local(parameter) for parameter in of]
        gradients = [
            weight.new_zeros(()) if parameter.grad is None else local(parameter.grad)
            for weight, parameter in zip(weights, of, strict=True)
        ]
        sizes = [len(own) for own in layers.values()]
        g, w = _norms(gradients, of, sizes), _norms(weights, of, sizes)
        if step.scale is not None:  # it changes from step to step, so the mean would feel it
            g = g / step.scale.to(g.device).reshape(())
        # Weights of zero say nothing of a rate: the mark is a mean below zero.
        ratios = torch.where(w > 0, g / w.clamp(min=TINY), -1.0)
        finite = ratios.isfinite().all()
        seen = torch.cat([torch.where(finite, ratios, 0.0), finite.to(ratios.dtype).reshape(1)])
        key = "|".join(layers)
        found = state.get(key)
        state.clear()  # of layers that another phase trained
        state[key] = seen if found is None else found.to(seen.device) + seen

    def before(self, step: Step, state: dict[str, Tensor]) -> None:
        """Decide where it is time to, and put the shares into the rates."""
        if step.number % self.every == 0:
            self._decide(step, state)
        for group in _groups(step.moving):
            group[_OWN] = group["lr"]
            group["lr"] = group["lr"] * group.get(_SHARE, 1.0)

    def after(self, step: Step, state: dict[str, Tensor]) -> None:  # noqa: ARG002
        """Give the groups their own rates back."""
        for group in _groups(step.moving):
            group["lr"] = group.pop(_OWN)

    def _decide(self, step: Step, state: dict[str, Tensor]) -> None:
        layers = list(_by_layer(step.moving))
        sums = state.pop("|".join(layers), None)
        if sums is None:
            return
        *totals, count = sums.tolist()
        largest = max(totals)
        if not count or largest <= 0:
            return
        shares = {layer: total / largest for layer, total in zip(layers, totals, strict=True) if total >= 0}
        for group in _groups(step.moving):
            if group["layer"] in shares:
                group[_SHARE] = max(self.floor, shares[group["layer"]])


def _by_layer(moving: Sequence[Moving]) -> dict[str, list[Moving]]:
    found: dict[str, list[Moving]] = {}
    for item in moving:
        found.setdefault(item.group["layer"], []).append(item)
    return found


def _groups(moving: Sequence[Moving]) -> list[dict[str, Any]]:
    return list({id(item.group): item.group for item in moving}.values())


def _norms(tensors: Sequence[Tensor], of: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """Norms of so many tensors at a time, taken together."""
    each = together(norms(tensors, of=of))
    return torch.stack(torch._foreach_norm(torch.split_with_sizes(each, sizes)))  # noqa: SLF001


class AutoRGN(Strategy):
    r"""Let each layer learn as fast as its gradient is large beside its weights.

    .. math:: \eta_l = \eta \, \frac{r_l}{\max_k r_k}, \qquad r_l = \frac{\lVert g_l \rVert_2}{\lVert w_l \rVert_2}

    over a layer's parameters that came from the source, g the loss's gradient before any pull. The first step decides
    at once; then every ``every`` steps the mean of r since the last decision does. The ratio does not depend on the
    batch size beyond the gradient's noise, nor on a loss scale. Whatever is fresh keeps its full rate, and so does a
    layer whose weights are all zero.

    The ratio multiplies the rate that a schedule, a phase or ``DiscriminativeLR`` gives, during the step alone; what
    the rate multiplies (a decoupled pull, a proximal step, weight decay) follows it. The optimizer and its statistics
    stay what they are.

    Measured with its defaults against plain fine-tuning at 1e-4, in points of the harmonic mean of both domains, for a
    new speaker with one and five recordings a word and for corrupted images: +0.0 ± 0.4, -0.0 ± 0.3 and +0.4 ± 0.8
    (benchmarks/results/methods.md).

    Cost: the norms of gradients and weights each step, groups for every layer; the host waits for the device once in
    ``every`` steps.

    Reference:
        Lee et al. 2022, "Surgical fine-tuning improves adaptation to distribution shifts", section 4: there a ratio
        for each tensor, once an epoch.
    """

    kind: Literal["auto_rgn"] = "auto_rgn"
    order: ClassVar[Order] = Order.HEAD  # its update stands first, so that the others see the rate it sets
    every: Annotated[int, Field(ge=1)] = 10
    """Steps from one decision to the next."""
    floor: Annotated[float, Field(ge=0, le=1)] = 0.0
    """The smallest ratio; 1 is plain training."""

    def apply(self, plan: Plan) -> Plan:
        """Add the update."""
        names = tuple(row.name for row in plan.rows if row.origin == "source" and not row.frozen)
        return plan.with_update(AutoRGNUpdate(by=self.label, names=names, every=self.every, floor=self.floor))
