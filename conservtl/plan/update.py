"""Updates: changes to weights at each step beside the gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from pydantic import SerializeAsAny
from torch import Tensor

from conservtl.plan.decision import Decision
from conservtl.plan.row import Row

__all__ = ["Moving", "Step", "Update", "Updates"]


@dataclass(frozen=True)
class Moving:
    """One trained parameter in a step.

    Args:
        row: its row of the plan.
        parameter: the tensor; if it is sharded a ``DTensor``, of which this process holds a part.
        anchor: its starting value, placed as it is; None if it is fresh, or if it is not asked for.
        group: its group of the optimizer; ``lr`` is its rate.
        measured: name of a measurement -> the tensor for this parameter, placed as it is.
    """

    row: Row
    parameter: Tensor
    anchor: Tensor | None
    group: dict[str, Any]
    measured: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Canonical name of the parameter."""
        return self.row.name


@dataclass(frozen=True)
class Step:
    """What an update sees of a step of the optimizer.

    Args:
        moving: the parameters it acts on that are trained now, in the plan's order.
        number: steps done before this one.
        skip: scalar tensor, non-zero where the step is going to be skipped (a scaler's ``found_inf``); to be read on
            the device. None where nobody can skip.
        scale: the factor that the gradients still carry, which a fused optimizer divides out. None: none.
    """

    moving: Sequence[Moving]
    number: int
    skip: Tensor | None = None
    scale: Tensor | None = None


class Update(Decision):
    """Something done to weights at each step beside the gradient.

    Its moments, all without gradient: ``prepare`` before a forward pass, ``gradients`` when they are complete and
    unscaled (or carry ``step.scale``) and before any pull, ``before`` and ``after`` the optimizer's step. What it
    must remember from one moment or step to the next stands in ``state``, which is saved with the adaptation.
    Random numbers come from a generator of its own, seeded by ``step.number``, so that copies, resumed runs and other
    processes draw the same. Where ``step.skip`` is not zero ``after`` changes nothing: the step is none.
    Nothing here may wait for the device: no ``item()``, no comparison on the host.
    """

    names: tuple[str, ...]
    """Parameters it acts on, while they are trained."""

    precedence: ClassVar[int] = 0
    """Updates of a lower precedence act first, and last after the step, as contexts nest; equal ones act by name. The
    built-in ones: AutoRGN -20 (the others see the rate it sets), Mixout -10 (the others see plain weights), proximal
    steps 10, Projection 20, SelectiveDecay 30 (it sees the weights as the optimizer left them)."""
    forward: ClassVar[bool] = False
    """Whether ``prepare`` is wanted, before each forward pass of the model."""
    layered: ClassVar[bool] = False
    """Whether each layer needs groups of its own in the optimizer, so that the update can set its rate."""
    anchors: ClassVar[bool] = True
    """Whether it needs to know where its parameters started; else ``Moving.anchor`` is None, and costs no memory."""
    shards: ClassVar[bool] = False
    """Whether it acts rightly on parameters that are sharded by rows over processes (FSDP2); else they are refused."""

    def prepare(self, step: Step, state: dict[str, Tensor], training: bool) -> None:
        """Before a forward pass; ``training``: in train mode and with gradients."""

    def gradients(self, step: Step, state: dict[str, Tensor]) -> None:
        """Once a step, before the pull."""

    def before(self, step: Step, state: dict[str, Tensor]) -> None:
        """Right before the optimizer's step and a decoupled pull."""

    def after(self, step: Step, state: dict[str, Tensor]) -> None:
        """Right after it; updates act in the reverse of their order here, as contexts nest."""


Updates = tuple[SerializeAsAny[Update], ...]
