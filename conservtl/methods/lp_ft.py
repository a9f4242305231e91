"""LP-FT: a linear probe first, then everything."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from conservtl.methods.base import Order, Strategy
from conservtl.plan.plan import Plan
from conservtl.plan.row import Length, Phase

__all__ = ["LPFT"]

Scale = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class LPFT(Strategy):
    """Train the head alone until it fits the source's features, then everything from there.

    A head that starts at random sends large gradients into the body and distorts features that were good; one that
    fits already does not. The head is whatever is fresh, or the classifier where nothing is. What another strategy
    freezes throughout stays frozen.

    Measured with its defaults against plain fine-tuning at 1e-4, in points of the harmonic mean of both domains, for a
    new speaker with one and five recordings a word and for corrupted images: -0.3 ± 0.5, -0.1 ± 0.4 and -0.1 ± 0.9
    (benchmarks/results/methods.md).

    Cost: none beside the epochs of the first phase, in which the frozen body is computed once where ``fit`` can
    (held data, no augmentation).

    Reference:
        Kumar, Raghunathan, Jones, Ma and Liang 2022, "Fine-tuning can distort pretrained features and underperform
        out-of-distribution", section 3.
    """

    kind: Literal["lp_ft"] = "lp_ft"
    order: ClassVar[Order] = Order.TIME
    epochs: Length = 0.2
    """Length of the linear probe, in epochs or as a share of the run's; the rest of it fine-tunes everything."""
    probe: Scale = 1.0
    """Factor on the rates while the head is trained alone; a probe bears more than fine-tuning does."""
    fine_tuning: Scale = 1.0
    """Factor on the rates when everything is trained."""

    def apply(self, plan: Plan) -> Plan:
        """Two phases."""
        head = set(plan.new)
        body = tuple(row.name for row in plan.rows if row.name not in head)
        phases = (
            Phase(name="linear probe", epochs=self.epochs, frozen=body, scale=self.probe),
            Phase(name="fine-tuning", scale=self.fine_tuning),
        )
        return plan.with_phases(self.label, phases)
