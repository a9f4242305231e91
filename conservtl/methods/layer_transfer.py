"""Layer transfer: some layers are copied from one side of the source, the others are trained."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from conservtl.errors import SourceError, SpecError
from conservtl.methods._rows import changed_layers, names_something
from conservtl.methods.base import Order, Strategy
from conservtl.plan.plan import Plan

__all__ = ["LayerTransfer"]

Number = Annotated[int, Field(ge=1, strict=True)]
Part = Annotated[float, Field(gt=0, le=1, strict=True)]
Globs = Annotated[tuple[str, ...], Field(min_length=1)]


class LayerTransfer(Strategy):
    """Copy layers from one side of the source model, freeze them, and train the others.

    For images transfer the input side: edges and shapes are shared between tasks. For speech transfer the output side:
    the words do not depend on the speaker. ``layers`` = n with ``freeze`` and ``rest="fresh"`` is AnB of the
    transferability experiments; without ``freeze`` it is AnB+.

    Cost: less than plain fine-tuning where layers are frozen; nothing else is kept.

    Hurts: where the frozen side is the one by which the domains differ, such as the input side under another
    microphone or corruption.

    Raises:
        SourceError: a transferred layer is not in the source, or has another shape there.
        SpecError: the model has fewer layers, or a glob matches none.

    Reference:
        Yosinski et al. 2014, "How transferable are features in deep neural networks?", section 3.

    Example:
        >>> import torch, conservtl as ctl
        >>> source, model = (torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(3))) for _ in range(2))
        >>> plan = ctl.adapt(model, source, [ctl.LayerTransfer(layers=2, rest="fresh")]).plan
        >>> [(row.name, row.origin, row.frozen) for row in plan.rows if row.kind == "weight"]
        [('0.weight', 'source', True), ('1.weight', 'source', True), ('2.weight', 'fresh', False)]
    """

    kind: Literal["layer_transfer"] = "layer_transfer"
    order: ClassVar[Order] = Order.ORIGIN
    side: Literal["input", "output"] = "input"
    """Side of the source that is transferred."""
    layers: Number | Part | Globs
    """Layers to transfer from that side: their number, their share of all layers, or globs of layer names."""
    rest: Literal["source", "fresh"] = "source"
    """Start of the other layers. A layer that does not fit its source is fresh in any case; parameters that were
    frozen when the model was handed in are copied in any case."""
    freeze: bool = True
    """Whether the transferred layers are frozen. False also trains parameters that were frozen when the model was
    handed in, if ``layers`` names their layer by a glob."""

    def apply(self, plan: Plan) -> Plan:
        """Choose origins, and the parameters that are frozen."""
        chosen = self.transferred(plan)
        for row in plan.rows:
            # A row that another strategy made fresh does fit its source; ``choose`` decides between the two.
            misfit = row.origin == "fresh" and not row.added and row.name not in plan.factors
            if row.layer in chosen and misfit and "origin" not in row.chosen:
                raise SourceError(
                    f"{self.label}(side={self.side!r}): layer {row.layer!r} is to be transferred, but {row.name!r} "
                    f"cannot be: {row.reason}. Transfer fewer layers, or name those that fit."
                )
        factors = [name for name in plan.factors if plan[name].layer in chosen]
        inside = [row.name for row in plan.rows if row.layer in chosen and not row.added and row.name not in factors]
        plan = plan.choose(self.label, "origin", {name: {"origin": "source", "reason": None} for name in inside})
        kept = set() if self.freeze else self._kept_as_found(plan)
        changed = [*inside, *factors] if self.freeze else [*inside, *(name for name in factors if plan[name].as_found)]
        plan = plan.choose(
            self.label, "frozen", {name: {"frozen": self.freeze} for name in changed if name not in kept}
        )
        if self.rest == "fresh":
            fields = {"origin": "fresh", "reason": f"declared fresh by {self.label}"}
            others = [row for row in plan.rows if row.layer not in chosen and row.origin == "source"]
            rest = {row.name: fields for row in others if not row.as_found}  # random and frozen would serve nobody
            plan = plan.choose(self.label, "origin", rest, explicit=False)
        return plan

    def _kept_as_found(self, plan: Plan) -> set[str]:
        """Return the parameters that were frozen when the model was handed in, but for those in layers named here.

        Of a layer with factors of low rank these are trained, and nothing else.
        """
        globs = [glob for glob in self.layers if names_something(glob)] if isinstance(self.layers, tuple) else []
        named = {layer for matched in plan.select_layers(globs, plan.own_layers).values() for layer in matched}
        by_factors = changed_layers(plan)
        return {
            row.name
            for row in plan.rows
            if row.as_found and (row.layer not in named or (row.layer in by_factors and row.name not in plan.factors))
        }

    def transferred(self, plan: Plan) -> frozenset[str]:
        """Return the names of the transferred layers; layers that a strategy added do not count."""
        layers = plan.own_layers
        if isinstance(self.layers, tuple):
            names = plan.select_layers(self.layers, layers).values()
            return frozenset(name for matched in names for name in matched)
        count = self.layers if isinstance(self.layers, int) else max(1, round(self.layers * len(layers)))
        if count > len(layers):
            raise SpecError(
                f"{self.label}: layers={count} asks for more than the model has ({len(layers)}: "
                f"{', '.join(layers)}). Ask for at most {len(layers)}."
            )
        chosen = frozenset(layers[:count] if self.side == "input" else layers[-count:])
        tied = next((name for name in plan.tied_head if plan[name].layer not in chosen), None)
        if self.side == "output" and tied is not None:
            raise SpecError(
                f"{self.label}: the layers of the output side include the head, and its weight is one tensor with "
                f"{plan.names_outside_head(tied)[0]!r}, in layer {plan[tied].layer!r} at the input side. Name layers: "
                f"layers={[plan[tied].layer, *layers[-count:]]}, or without {plan[tied].layer!r}."
            )
        return chosen
