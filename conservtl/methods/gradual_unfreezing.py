"""Gradual unfreezing: the same decisions, changing from phase to phase."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from conservtl.methods.base import Order, Strategy
from conservtl.plan.plan import Plan
from conservtl.plan.row import Length, Phase

__all__ = ["GradualUnfreezing", "Stage"]

Scale = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Stage(BaseModel):
    """One phase, written out."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, defer_build=True)

    train: tuple[str, ...] | None = None
    """Globs of the layers or parameters that are trained; None: all that are not frozen throughout."""
    epochs: Length | None = None
    """How long, in epochs or as a share of the run's; None: to the end (the last stage only)."""
    scale: Scale = 1.0
    """Factor on all rates."""


class GradualUnfreezing(Strategy):
    """Train one end first, then more, then everything.

    ``by="head"`` (the classic): the head, or whatever is fresh, for ``epochs``, then everything.
    ``by="layer"``: one layer more every ``epochs``, starting ``at`` the output or the input side.
    ``phases``: written out stage by stage. What another strategy freezes throughout stays frozen.

    Reference:
        Howard and Ruder 2018, "Universal language model fine-tuning for text classification", 3.3.
    """

    kind: Literal["gradual_unfreezing"] = "gradual_unfreezing"
    order: ClassVar[Order] = Order.TIME
    by: Literal["head", "layer"] = "head"
    """What is unfrozen at a time."""
    epochs: Length = 1
    """Length of every phase but the last, in epochs or as a share of the run's; the last goes on to the end."""
    at: Literal["output", "input"] = "output"
    """Which side comes first, for ``by="layer"``."""
    scales: tuple[Scale, Scale] = (1.0, 1.0)
    """Factors on the rates in the first phases and in the last; fastai's fine_tune has (1, 0.5)."""
    phases: Annotated[tuple[Stage, ...], Field(min_length=1)] | None = None
    """Explicit stages instead of ``by``."""

    @model_validator(mode="after")
    def _ends(self) -> Self:
        if self.phases and any(stage.epochs is None for stage in self.phases[:-1]):
            raise ValueError("every stage of phases but the last needs a number of epochs")
        # By value: a spec with every default written out is the same spec.
        fields = type(self).model_fields
        clash = [name for name in ("by", "epochs", "at", "scales") if getattr(self, name) != fields[name].default]
        if self.phases and clash:
            raise ValueError(f"phases are written out, so {clash} would be ignored: leave them out")
        if self.phases is None and self.by == "head" and self.at != "output":
            raise ValueError("at belongs to by='layer': the head is where it is. Leave at out, or set by='layer'")
        return self

    def apply(self, plan: Plan) -> Plan:
        """Replace the plan's single phase."""
        if self.phases is not None:
            stages = [self._written(plan, stage, number) for number, stage in enumerate(self.phases)]
            return plan.with_phases(self.label, stages)
        if self.by == "head":
            return plan.with_phases(self.label, [self._phase(plan, "head", plan.new), self._last()])
        free = {row.layer for row in plan.rows if not row.frozen}
        order = [layer for layer in plan.layers if layer in free]
        order = order[::-1] if self.at == "output" else order
        stages = [
            self._phase(
                plan, "1 layer" if n == 1 else f"{n} layers", [row.name for row in plan.rows if row.layer in order[:n]]
            )
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
    kept = set(trained)
    return tuple(row.name for row in plan.rows if row.name not in kept)
