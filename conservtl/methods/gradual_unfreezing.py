"""Gradual unfreezing: parameters that are trained change from phase to phase."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from conservtl.bounds import Positive
from conservtl.errors import counted
from conservtl.methods._rows import names_something, train_named
from conservtl.methods.base import Order, Span, Strategy, TestFields
from conservtl.plan.plan import Plan
from conservtl.plan.row import Length, Phase
from conservtl.spec_model import FrozenModel

__all__ = ["GradualUnfreezing", "Stage"]


class Stage(FrozenModel):
    """One phase, written out."""

    test_fields: ClassVar[TestFields] = ({"epochs": [range(1, 4), Span(0.05, 0.3)], "scale": Span(0.1, 1)},)
    train: tuple[str, ...] | None = None
    """Globs of the layers or parameters that are trained. None: all that are not frozen throughout."""
    epochs: Length | None = None
    """Length, in epochs or as a share of the run's. None: to the end (the last stage only)."""
    scale: Positive = 1.0
    """Factor on all rates."""


class GradualUnfreezing(Strategy):
    """Train one end of the model first, then more of it, then everything.

    ``by="head"`` (the classic): the head, or all fresh parameters, for ``epochs``; then everything. ``by="layer"``:
    one layer more every ``epochs``, from the output or the input side (``at``). ``phases``: stages written out one by
    one. Parameters that another strategy freezes throughout stay frozen, and so do those that were frozen when the
    model was handed in, unless a stage of ``phases`` names them or their layer.

    Cost: none: frozen layers keep no statistics of the optimizer.

    Hurts: where training is short: layers that thaw last have few steps left.

    Reference:
        Howard and Ruder 2018, "Universal language model fine-tuning for text classification", 3.3.

    Example:
        >>> import torch, conservtl as ctl
        >>> source, model = (torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(3))) for _ in range(2))
        >>> plan = ctl.adapt(model, source, [ctl.GradualUnfreezing(by="layer", epochs=2)]).plan
        >>> for phase in plan.phases:
        ...     print(f"{phase.name}, {phase.lasts}: {len(plan.rows) - len(phase.frozen)} parameters are trained")
        1 layer, 2 epochs: 2 parameters are trained
        2 layers, 2 epochs: 4 parameters are trained
        all, to the end: 6 parameters are trained
    """

    kind: Literal["gradual_unfreezing"] = "gradual_unfreezing"
    order: ClassVar[Order] = Order.TIME
    test_fields: ClassVar[TestFields] = (
        {"phases": None, "epochs": [range(1, 4), Span(0.05, 0.3)], "scales": (Span(0.1, 1), Span(0.1, 1))},
        {"phases": tuple[Stage, ...], "by": "head", "epochs": 1, "at": "output", "scales": (1.0, 1.0)},
    )
    by: Literal["head", "layer"] = "head"
    """Unit that is unfrozen at a time."""
    epochs: Length = 1
    """Length of every phase but the last, in epochs or as a share of the run's; the last goes on to the end."""
    at: Literal["output", "input"] = "output"
    """Side that is trained first, for ``by="layer"``."""
    scales: tuple[Positive, Positive] = (1.0, 1.0)
    """Factors on the rates in all phases but the last, and in the last; fastai's fine_tune has (1, 0.5)."""
    phases: Annotated[tuple[Stage, ...], Field(min_length=1)] | None = None
    """Stages written out, instead of ``by``."""

    @model_validator(mode="after")
    def _ends(self) -> Self:
        if self.phases and any(stage.epochs is None for stage in self.phases[:-1]):
            raise ValueError("every stage of phases but the last needs a number of epochs")
        # Compared by value: a spec with every default written out means the same.
        fields = type(self).model_fields
        clashes = [name for name in ("by", "epochs", "at", "scales") if getattr(self, name) != fields[name].default]
        if self.phases and clashes:
            raise ValueError(f"phases are written out, so {clashes} would be ignored: leave them out")
        if self.phases is None and self.by == "head" and self.at != "output":
            raise ValueError("at is for by='layer' only. Leave at out, or set by='layer'")
        return self

    def apply(self, plan: Plan) -> Plan:
        """Set the plan's phases."""
        if self.phases is not None:
            globs = [glob for stage in self.phases for glob in stage.train or () if names_something(glob)]
            plan = train_named(plan, self.label, [name for names in plan.select(globs).values() for name in names])
            stages = [self._written(plan, stage, number) for number, stage in enumerate(self.phases)]
            return plan.with_phases(self.label, stages)
        if self.by == "head":
            return plan.with_phases(self.label, [self._phase(plan, "head", plan.new), self._last()])
        free = {row.layer for row in plan.rows if not row.frozen}
        order = [layer for layer in plan.layers if layer in free]
        order = order[::-1] if self.at == "output" else order
        stages = [
            self._phase(plan, counted(n, "layer"), [row.name for row in plan.rows if row.layer in order[:n]])
            for n in range(1, len(order))
        ]
        return plan.with_phases(self.label, [*stages, self._last()])

    def _phase(self, plan: Plan, name: str, trained: Sequence[str]) -> Phase:
        return Phase(name=name, epochs=self.epochs, frozen=_others(plan, trained), scale=self.scales[0])

    def _last(self) -> Phase:
        return Phase(name="all", scale=self.scales[1])

    @staticmethod
    def _written(plan: Plan, stage: Stage, number: int) -> Phase:
        if stage.train is None:
            return Phase(name="all", epochs=stage.epochs, scale=stage.scale)
        trained = [name for names in plan.select(stage.train).values() for name in names]
        return Phase(name=f"stage {number + 1}", epochs=stage.epochs, frozen=_others(plan, trained), scale=stage.scale)


def _others(plan: Plan, trained: Sequence[str]) -> tuple[str, ...]:
    """Return the parameters that are not trained."""
    names = set(trained)
    return tuple(row.name for row in plan.rows if row.name not in names)
