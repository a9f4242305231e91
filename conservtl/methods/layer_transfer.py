"""Layer transfer: copy some layers from one side of the source, train the rest."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from conservtl.errors import SourceError, SpecError
from conservtl.layers import select
from conservtl.methods.base import Order, Strategy
from conservtl.plan.plan import Plan

__all__ = ["LayerTransfer"]

Count = Annotated[int, Field(ge=1, strict=True)]
Fraction = Annotated[float, Field(gt=0, le=1, strict=True)]
Globs = Annotated[tuple[str, ...], Field(min_length=1)]


class LayerTransfer(Strategy):
    """Copy layers from one side of the source model and train the others.

    Vision keeps the input side (edges and shapes are shared between tasks), speech the output side
    (what is said does not depend on who speaks). With ``layers`` = n, ``freeze`` on and
    ``rest="fresh"`` this is AnB of the transferability experiments; with ``freeze`` off, AnB+.

    Raises:
        SourceError: a transferred layer is not in the source, or not with this shape.
        SpecError: more layers asked for than the model has, or a glob that matches no layer.

    Reference:
        Yosinski et al. 2014, "How transferable are features in deep neural networks?", section 3.
    """

    kind: Literal["layer_transfer"] = "layer_transfer"
    order: ClassVar[Order] = Order.ORIGIN
    side: Literal["input", "output"] = "input"
    """Which side of the source is transferred."""
    layers: Count | Fraction | Globs
    """How many layers from that side: a number, a fraction of all, or globs of layer names."""
    rest: Literal["source", "fresh"] = "source"
    """What the other layers start from. A layer that does not fit its source is fresh in any case."""
    freeze: bool = True
    """Whether the transferred layers are frozen."""

    def apply(self, plan: Plan) -> Plan:
        """Choose origins and what is frozen."""
        chosen = self.transferred(plan)
        for row in plan.rows:
            # What another strategy made fresh fits; whether it may be claimed is for ``choose`` to say.
            if row.layer in chosen and row.origin == "fresh" and not row.added and "origin" not in row.chosen:
                raise SourceError(
                    f"{self.label}(side={self.side!r}): layer {row.layer!r} is to be transferred, but {row.name!r} "
                    f"cannot be: {row.reason}. Transfer fewer layers, or name those that fit."
                )
        inside = [row.name for row in plan.rows if row.layer in chosen and not row.added]
        plan = plan.choose(self.label, "origin", {name: {"origin": "source", "reason": None} for name in inside})
        plan = plan.choose(self.label, "frozen", {name: {"frozen": self.freeze} for name in inside})
        if self.rest == "fresh":
            fields = {"origin": "fresh", "reason": f"declared fresh by {self.label}"}
            rest = {row.name: fields for row in plan.rows if row.layer not in chosen and row.origin == "source"}
            plan = plan.choose(self.label, "origin", rest, explicit=False)
        return plan

    def transferred(self, plan: Plan) -> frozenset[str]:
        """Names of the layers that are transferred; one that a strategy added does not count."""
        layers = plan.own_layers
        if isinstance(self.layers, tuple):
            found = select(self.layers, layers, "layer")
            return frozenset(name for names in found.values() for name in names)
        count = self.layers if isinstance(self.layers, int) else max(1, round(self.layers * len(layers)))
        if count > len(layers):
            raise SpecError(
                f"{self.label}: layers={count} asks for more than the model has ({len(layers)}: "
                f"{', '.join(layers)}). Ask for at most {len(layers)}."
            )
        return frozenset(layers[:count] if self.side == "input" else layers[-count:])
