"""Auto-RGN: learning rates from relative gradient norms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from conservtl.bounds import Count, Share
from conservtl.compat import foreach_norm
from conservtl.kernels.backend import split
from conservtl.kernels.deviation import TINY, norms, together
from conservtl.kernels.dtensor import local
from conservtl.methods._rows import source_parameters
from conservtl.methods.base import Order, Strategy, TestFields
from conservtl.plan.plan import Plan
from conservtl.plan.update import Moving, Prepared, Step, Update

__all__ = ["AutoRGN", "AutoRGNUpdate"]

_FACTOR, _RATE = "share", "own_lr"  # keys of an optimizer's group, saved with it


class AutoRGN(Strategy):
    r"""Scale each layer's learning rate by the norm of its gradient relative to the norm of its weights.

    .. math:: \eta_l = \eta \, \frac{r_l}{\max_k r_k}, \qquad r_l = \frac{\lVert g_l \rVert_2}{\lVert w_l \rVert_2}

    over a layer's parameters from the source; g is the gradient of the loss before any pull. The first step decides
    at once, then every ``every`` steps the mean of r since the last decision does. The ratio does not depend on a
    loss scale, and on the batch size only through the noise of the gradient. Fresh parameters, and layers whose
    weights are all zero, keep the full rate.

    The factor acts during the step alone, on the rate that a schedule, a phase or ``DiscriminativeLR`` gives.
    Everything that the rate multiplies (a decoupled pull, a proximal step, weight decay) follows it.

    Measured: docs/methods.md.

    Cost: the norms of gradients and weights in each step, one or more optimizer groups for each layer; the host waits
    for the device once in ``every`` steps.

    Hurts: where the ratios follow single small batches, so layers may get rates that chance decides.

    Reference:
        Lee et al. 2022, "Surgical fine-tuning improves adaptation to distribution shifts", section 4: there a ratio
        for each tensor, once an epoch.

    Example:
        >>> import torch, conservtl as ctl
        >>> model = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False))
        >>> source = {"0.weight": torch.ones(1, 1), "1.weight": torch.ones(1, 1)}
        >>> adaptation = ctl.adapt(model, source, [ctl.AutoRGN()])
        >>> optimizer = adaptation.optimizer(torch.optim.SGD, lr=0.1)
        >>> model[0].weight.grad, model[1].weight.grad = torch.tensor([[4.0]]), torch.tensor([[1.0]])
        >>> optimizer.step()  # the second layer takes a quarter of the rate
        >>> [round(1 - layer.weight.item(), 3) for layer in model]
        [0.4, 0.025]
    """

    kind: Literal["auto_rgn"] = "auto_rgn"
    order: ClassVar[Order] = Order.HEAD
    test_fields: ClassVar[TestFields] = ({"every": range(1, 4)},)
    every: Count = 10
    """Steps from one decision to the next."""
    floor: Share = 0.0
    """Smallest factor; 1 is plain training."""

    def apply(self, plan: Plan) -> Plan:
        """Add the update."""
        names = source_parameters(plan, "all")
        return plan.with_update(AutoRGNUpdate(by=self.label, names=names, every=self.every, floor=self.floor))


class AutoRGNUpdate(Update):
    """Each layer's rate times its factor: |g| / |w|, divided by the largest such ratio of any layer.

    The factor is kept in the optimizer's groups and saved with them. It multiplies the rate during the step alone, so
    that schedulers and phases see their own rates.
    """

    kind: Literal["auto_rgn"] = "auto_rgn"
    precedence: ClassVar[int] = -20
    every: Count
    """Steps from one decision to the next; the host waits for the device at decisions only."""
    floor: Share = 0.0
    """Smallest factor."""

    layered: ClassVar[bool] = True
    anchors: ClassVar[bool] = False
    shards: ClassVar[bool] = True

    def describe(self) -> str:
        """Return one line for the plan's table."""
        often = "each step" if self.every == 1 else f"every {self.every} steps"
        return f"learning rate × relative gradient norm of each layer, decided {often}"

    def gradients(self, step: Step, state: dict[str, Tensor]) -> None:
        """Add this step's ratios to their sums, unless one is not finite."""
        if not step.moving:
            return
        found = _found(step.moving)
        key = "|".join(found.layers)
        sums = state.get(key)
        state.clear()  # it may hold the layers of another phase
        moves, rest = split(step.moving)
        if moves is not None and moves.whole and not rest:
            state[key] = moves.layer_ratios(found.layer_of, step.scale, sums)
            return
        if moves is not None and not rest:
            w, g = (one.sqrt() for one in moves.over(found.layer_of, moves.sums("weight, gradient")))
        else:
            w, g = _norms(step.moving)
        if step.scale is not None:  # it may change between steps, and the mean would weigh them by it
            g = g / step.scale.to(g.device).reshape(())
        # A layer of zero weights has no ratio: a negative sum marks it.
        ratios = torch.where(w > 0, g / w.clamp(min=TINY), -1.0)
        finite = ratios.isfinite().all()
        seen = torch.cat([torch.where(finite, ratios, 0.0), finite.to(ratios.dtype).reshape(1)])
        state[key] = seen if sums is None else sums.to(seen.device) + seen

    def before(self, step: Step, state: dict[str, Tensor]) -> None:
        """Decide if a decision is due, and multiply the rates by the factors."""
        if step.number % self.every == 0:
            self._decide(step, state)
        for group in _found(step.moving).groups:
            group[_RATE] = group["lr"]
            group["lr"] = group["lr"] * group.get(_FACTOR, 1.0)

    def after(self, step: Step, state: dict[str, Tensor]) -> None:  # noqa: ARG002
        """Restore the rates of the groups."""
        for group in _found(step.moving).groups:
            group["lr"] = group.pop(_RATE)

    def _decide(self, step: Step, state: dict[str, Tensor]) -> None:
        layers = _found(step.moving).layers
        sums = state.pop("|".join(layers), None)
        if sums is None:
            return
        *totals, count = sums.tolist()
        largest = max(totals)
        if not count or largest <= 0:
            return
        factors = {layer: total / largest for layer, total in zip(layers, totals, strict=True) if total >= 0}
        for group in _found(step.moving).groups:
            if group["layer"] in factors:
                group[_FACTOR] = max(self.floor, factors[group["layer"]])


class _Found(NamedTuple):
    """Layer of each parameter, the layers, and the optimizer's groups, in the order of their first use."""

    layer_of: list[str]
    layers: list[str]
    groups: list[dict[str, Any]]


def _found(moving: Sequence[Moving]) -> _Found:
    """Return the layers and groups of parameters, kept with them from step to step."""
    kept = moving.kept if isinstance(moving, Prepared) else {}
    if _Found not in kept:
        layer_of = [item.group["layer"] for item in moving]
        groups = {id(item.group): item.group for item in moving}
        kept[_Found] = _Found(layer_of, list(dict.fromkeys(layer_of)), list(groups.values()))
    found: _Found = kept[_Found]
    return found


def _norms(moving: Sequence[Moving]) -> tuple[Tensor, Tensor]:
    """Return the norms of the weights and of the gradients of each layer."""
    layers: dict[str, list[Moving]] = {}
    for item in moving:
        layers.setdefault(item.group["layer"], []).append(item)
    parameters = [item.parameter for items in layers.values() for item in items]
    weights = [local(parameter) for parameter in parameters]
    gradients = [
        weight.new_zeros(()) if parameter.grad is None else local(parameter.grad)
        for weight, parameter in zip(weights, parameters, strict=True)
    ]
    sizes = [len(items) for items in layers.values()]
    return _layer_norms(weights, parameters, sizes), _layer_norms(gradients, parameters, sizes)


def _layer_norms(tensors: Sequence[Tensor], parameters: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """Return the norm of each layer, given tensors layer by layer, their parameters and the number of each layer's."""
    each = together(norms(tensors, of=parameters))
    return torch.stack(foreach_norm(torch.split_with_sizes(each, sizes)))
