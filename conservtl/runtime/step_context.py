"""The state of an adaptation that the steps of its optimizers read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

from torch import Tensor, nn

from conservtl.plan.plan import Plan
from conservtl.runtime.anchors import Anchors
from conservtl.runtime.endings import Endings
from conservtl.runtime.update_runner import UpdateRunner

__all__ = ["StepContext"]


class StepContext(Protocol):
    """Attributes that steps read; they read them again if ``revision`` has changed."""

    model: nn.Module
    """The model that is trained."""
    penalty_in_gradients: bool
    """Whether the gradients hold that of ``penalty()`` already."""
    endings: Endings
    """Work at the end of training."""

    @property
    def revision(self) -> int:
        """A number that grows whenever the plan, the phase, the anchors or a measurement changes."""

    @property
    def plan(self) -> Plan:
        """The decisions in force."""

    @property
    def frozen(self) -> frozenset[str]:
        """Parameters that the current phase does not train."""

    @property
    def anchors(self) -> Anchors:
        """Starting values."""

    @property
    def measured(self) -> Mapping[str, Mapping[str, Tensor]]:
        """Measurements: name -> their tensors on the CPU."""

    @property
    def updates(self) -> UpdateRunner:
        """The plan's updates with their state and the number of steps."""

    def check_model(self, members: Iterable[tuple[str, Tensor]]) -> None:
        """Raise if the model has changed since the optimizer was made, given the optimizer's parameters by name."""

    def check_measured(self) -> None:
        """Raise unless every measurement of the plan has been made."""

    def check_terms(self) -> None:
        """Raise if the gradients lack what the plan adds to the loss."""
