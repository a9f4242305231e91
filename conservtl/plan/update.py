"""Updates: changes to weights at each step beside the gradient."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import SerializeAsAny
from torch import Tensor

from conservtl.errors import SpecError
from conservtl.plan.decision import Decision
from conservtl.plan.row import Row

if TYPE_CHECKING:
    from conservtl.plan.penalty import Penalty

__all__ = ["Moving", "NamingFresh", "Prepared", "Step", "Update", "Updates"]


@dataclass(frozen=True)
class Moving:
    """One trained parameter in a step.

    Args:
        row: its row of the plan.
        parameter: the tensor; if it is sharded a ``DTensor``, of which this process holds a part.
        anchor: its starting value, placed as it is; None if it is fresh, or if it is not asked for.
        group: its group of the optimizer; ``lr`` is its rate.
        measured: name of a measurement -> the tensor for this parameter, placed as it is.
        new: which of its elements are of new rows (labels that the source does not know), on its device; the anchor
            equals the parameter there. None: none of them, or all.
    """

    row: Row
    parameter: Tensor
    anchor: Tensor | None
    group: dict[str, Any]
    measured: Mapping[str, Tensor] = field(default_factory=dict)
    new: Tensor | None = None

    @property
    def name(self) -> str:
        """Canonical name of the parameter."""
        return self.row.name


class Prepared(list[Moving]):
    """Parameters of an update, the same for many steps, with what was prepared for them.

    It is replaced when a parameter, its memory, the phase or the anchors change.
    """

    def __init__(self, moving: Iterable[Moving]) -> None:
        super().__init__(moving)
        self.kept: dict[Any, Any] = {}


class NamingFresh:
    """Context of a decision's code: if it fails as if it took an anchor of None for a tensor, name the parameters.

    A class, because a generator would cost some of the microseconds that a step has.

    Raises:
        SpecError: an attribute or a type is wrong, and an anchor is None.
    """

    __slots__ = ("_decision", "_moving")

    def __init__(self, decision: Update | Penalty, moving: Sequence[Moving]) -> None:
        self._decision, self._moving = decision, moving

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if not isinstance(error, (AttributeError, TypeError)):
            return
        decision = self._decision
        if missing := [item.name for item in self._moving if item.anchor is None]:
            why, fix = "they are fresh", "Name only rows of origin 'source', or handle an anchor of None."
            if not type(decision).anchors:
                why, fix = f"{type(decision).__name__}.anchors is False", "Declare it True."
            raise SpecError(
                f"{decision.by}: {missing} have no anchor: {why}; received {type(error).__name__}: {error}. {fix}"
            ) from error


@dataclass(frozen=True)
class Step:
    """One step of the optimizer, as an update receives it.

    Args:
        moving: the update's parameters that are trained now, in the order of the optimizer's groups.
        number: number of steps done before this one.
        skip: scalar tensor, non-zero if the step will be skipped (a scaler's ``found_inf``); read it on the device.
            None: the step will not be skipped.
        scale: factor that the gradients still carry, which a fused optimizer divides out. None: 1.
    """

    moving: Sequence[Moving]
    number: int
    skip: Tensor | None = None
    scale: Tensor | None = None


class Update(Decision):
    """A change of weights or gradients at each step.

    Its methods are called without autograd: ``prepare`` before a forward pass, ``gradients`` when the gradients are
    complete and unscaled (or carry ``step.scale``) and before the penalties, ``before`` and ``after`` the optimizer's
    step. Five rules, which ``conservtl.testing.check_strategy`` checks as far as it can:

    - What it remembers from one call to the next stands in ``state``, which is saved with the adaptation.
    - Random numbers come from a generator of its own, seeded by ``step.number``, so that copies, resumed runs and
      other processes draw the same.
    - A parameter's ``grad`` may be None, and carries ``step.scale``.
    - ``after`` changes nothing if ``step.skip`` is not zero.
    - Nothing waits for the device: no ``item()``, no comparison on the host.

    A penalty on weights is a ``Penalty`` instead, for which the first four are taken care of.
    """

    names: tuple[str, ...]
    """Parameters it acts on, while they are trained."""

    precedence: ClassVar[int] = 0
    """Updates of a lower precedence act first, and last after the step, as contexts nest; equal ones act by name. The
    built-in ones: AutoRGN -20 (the others see the rate it sets), Mixout -10 (the others see plain weights), proximal
    steps 10, Projection 20, SelectiveDecay 30 (it sees the weights as the optimizer left them)."""
    forward: ClassVar[bool] = False
    """Whether ``prepare`` is called, before each forward pass of the model."""
    layered: ClassVar[bool] = False
    """Whether each layer needs groups of its own in the optimizer, so that the update can set its rate."""
    anchors: ClassVar[bool] = True
    """Whether it needs the starting values; if not, ``Moving.anchor`` is None and costs no memory. Fresh parameters
    have none."""
    shards: ClassVar[bool] = False
    """Whether it supports parameters that are sharded by rows over processes (FSDP2), which are refused otherwise."""

    def prepare(self, step: Step, state: dict[str, Tensor], training: bool) -> None:
        """Act before a forward pass; ``training``: in train mode and with gradients."""

    def gradients(self, step: Step, state: dict[str, Tensor]) -> None:
        """Act on complete gradients, once a step, before the penalties are added."""

    def before(self, step: Step, state: dict[str, Tensor]) -> None:
        """Act right before the optimizer's step and the decoupled penalties."""

    def after(self, step: Step, state: dict[str, Tensor]) -> None:
        """Act right after the optimizer's step; here updates act in reverse order, as contexts nest."""


Updates = tuple[SerializeAsAny[Update], ...]
