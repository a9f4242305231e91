"""LP-FT: a linear probe first, then fine-tuning of everything."""

from __future__ import annotations

from typing import ClassVar, Literal

from conservtl.bounds import Positive
from conservtl.methods.base import Order, Span, Strategy, TestFields
from conservtl.plan.plan import Plan
from conservtl.plan.row import Length, Phase

__all__ = ["LPFT"]


class LPFT(Strategy):
    """Train the head alone until it fits the source's features, then train everything.

    A head that starts at random sends large gradients into the body and distorts good features; a fitted head does
    not. The head is all fresh parameters, or the classifier if there are none. Parameters that another strategy
    freezes throughout stay frozen. A head that shares its weight with an embedding is no
    probe of fixed features: the first phase trains both.

    Measured: docs/methods.md.

    Cost: the epochs of the first phase. ``fit`` computes the frozen body once for each example if it holds the data
    and nothing augments it.

    Hurts: where source and target have the same labels and the source's head fits already: the first phase then
    costs epochs for nothing.

    Reference:
        Kumar, Raghunathan, Jones, Ma and Liang 2022, "Fine-tuning can distort pretrained features and underperform
        out-of-distribution", section 3.

    Example:
        >>> import torch, conservtl as ctl
        >>> source, model = (torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(3))) for _ in range(2))
        >>> plan = ctl.adapt(model, source, [ctl.LPFT(fine_tuning=0.1)]).plan
        >>> for phase in plan.phases:
        ...     print(f"{phase.name}, {phase.lasts}, rates × {phase.scale:g}, frozen: {list(phase.frozen)}")
        linear probe, 20 % of the epochs, rates × 1, frozen: ['0.weight', '0.bias', '1.weight', '1.bias']
        fine-tuning, to the end, rates × 0.1, frozen: []
    """

    kind: Literal["lp_ft"] = "lp_ft"
    order: ClassVar[Order] = Order.TIME
    test_fields: ClassVar[TestFields] = (
        {"epochs": [range(1, 4), Span(0.05, 0.3)], "probe": Span(0.1, 1), "fine_tuning": Span(0.1, 1)},
    )
    epochs: Length = 0.2
    """Length of the linear probe, in epochs or as a share of the run's; fine-tuning takes the rest."""
    probe: Positive = 1.0
    """Factor on the rates of the linear probe; it bears a larger rate than fine-tuning does."""
    fine_tuning: Positive = 1.0
    """Factor on the rates of fine-tuning."""

    def apply(self, plan: Plan) -> Plan:
        """Set two phases."""
        head = set(plan.new)
        body = tuple(row.name for row in plan.rows if row.name not in head)
        phases = (
            Phase(name="linear probe", epochs=self.epochs, frozen=body, scale=self.probe),
            Phase(name="fine-tuning", scale=self.fine_tuning),
        )
        return plan.with_phases(self.label, phases)
