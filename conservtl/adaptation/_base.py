"""The state of an adaptation: a model and the plan bound to it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from conservtl.adaptation.origin import Origin
from conservtl.layers import Layer
from conservtl.plan.plan import Plan
from conservtl.runtime.bound_plan import BoundPlan
from conservtl.source.transfer import TransferReport

__all__ = ["AdaptationBase"]


class AdaptationBase:
    """A model with its plan, and what was copied: the part that the groups of methods share."""

    def __init__(
        self, model: nn.Module, plan: Plan, transfer: TransferReport, layers: tuple[Layer, ...], origin: Origin
    ) -> None:
        self.transfer, self._origin = transfer, origin
        eval_norms = origin.training is not None and origin.training.batch_norm == "eval"
        self.bound = BoundPlan(model, plan, layers, origin.source_model, origin.heads, norms_in_eval=eval_norms)

    @property
    def model(self) -> nn.Module:
        """The model, changed in place."""
        return self.bound.model

    @property
    def plan(self) -> Plan:
        """The decisions in force."""
        return self.bound.plan

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The model's layers, input side first."""
        return self.bound.layers

    @property
    def origin(self) -> Origin:
        """What the plan was drawn up from."""
        return self._origin

    @property
    def training(self) -> Any:
        """Training settings handed to ``adapt`` in a recipe; None without."""
        return self.origin.training

    @property
    def phase(self) -> int:
        """Position of the current phase in ``plan.phases``."""
        return self.bound.phase

    @property
    def frozen(self) -> frozenset[str]:
        """Parameters that the current phase does not train."""
        return self.bound.frozen

    @property
    def measured(self) -> dict[str, dict[str, Tensor]]:
        """Measurements made so far: name -> their tensors on the CPU."""
        return self.bound.measured

    @property
    def start(self) -> dict[str, Tensor]:
        """Starting point of everything copied from the source, on the CPU: parameters and buffers by name.

        If parameters are sharded, all processes read it together.
        """
        copied = set(self.transfer.copied)
        anchors = self.bound.anchors
        buffers = {name: buffer for name, buffer in anchors.buffers.items() if name in copied}
        self.bound.parameters()
        return {**buffers, **anchors.start(self.model, self.plan)}
