"""The plan's penalties in a step: annealed, signed, and added to the gradients or a step of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from conservtl.kernels.deviation import placed
from conservtl.kernels.dtensor import whole
from conservtl.plan.penalty import Penalty
from conservtl.runtime.parameter_index import ParameterIndex, penalised
from conservtl.runtime.step_context import StepContext

__all__ = ["PenaltyRunner", "total_penalty"]


class PenaltyRunner:
    """Runs penalties on the parameters of one optimizer.

    Args:
        index: of the optimizer.
        context: the adaptation's state.
    """

    def __init__(self, index: ParameterIndex, context: StepContext) -> None:
        self._index, self._context = index, context

    @torch.no_grad()
    def add_gradients(self, scale: Tensor | None, *, maximize: bool) -> None:
        """Add the coupled penalties to complete gradients, once a step.

        Args:
            scale: the factor that the gradients still carry, which a fused optimizer divides out; None: 1.
            maximize: whether the optimizer goes up its gradients.
        """
        for penalty in self._context.plan.penalties:
            factor = self._factor(penalty)
            if penalty.mode == "coupled" and factor:
                for kernel in self._index.kernels(penalty):
                    kernel.add_gradients(-factor if maximize else factor, scale)

    @torch.no_grad()
    def move_weights(self, skip: Tensor | None) -> None:
        """Carry out the steps of the decoupled penalties.

        Args:
            skip: scalar tensor, non-zero if the step will be skipped; None: it will not.
        """
        for penalty in self._context.plan.penalties:
            factor = self._factor(penalty)
            if penalty.mode == "decoupled" and factor:
                for kernel in self._index.kernels(penalty):
                    kernel.move_weights(factor, skip)

    def _factor(self, penalty: Penalty) -> float:
        return _factor(penalty, self._context)


def total_penalty(context: StepContext, parameters: Mapping[str, nn.Parameter]) -> Tensor:
    """Return the sum of the penalties' values on what is trained now, a scalar with gradient.

    Args:
        context: the adaptation's state.
        parameters: name -> parameter of the model.
    """
    values = []
    for penalty in context.plan.penalties:
        names = [name for name in penalty.names if name not in context.frozen]
        moving = [penalised(penalty, context, context.plan[name], parameters[name], {}) for name in names]
        if moving:
            widened = [
                replace(item, anchor=None if item.anchor is None else placed(item.anchor, item.parameter))
                for item in moving
            ]
            values.append(_factor(penalty, context) * penalty.value(widened))
    if not values:
        return torch.zeros((), device=next(iter(parameters.values())).device, requires_grad=True)
    return whole(torch.stack([value.to(values[0].device) for value in values]).sum())


def _factor(penalty: Penalty, context: StepContext) -> float:
    return 1.0 if penalty.anneal is None else penalty.anneal.factor(context.updates.number)
