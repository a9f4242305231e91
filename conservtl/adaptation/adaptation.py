"""The adaptation: a model with its plan, as a user trains it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conservtl.adaptation import _state
from conservtl.adaptation._finishing import FinishingMethods
from conservtl.adaptation._loop import LoopMethods
from conservtl.adaptation._measurements import MeasurementMethods
from conservtl.fragments import fragment
from conservtl.layers import unwrap
from conservtl.layers.copying import deep_copy

__all__ = ["Adaptation"]


class Adaptation(MeasurementMethods, LoopMethods, FinishingMethods):
    """A model with its plan: makes the optimizer, the loss, the measurements and the finished weights.

    Args:
        model: the model, already at its starting point.
        plan: the decisions.
        transfer: what was copied.
        layers: the model's layers.
        origin: what the plan was drawn up from.

    A deep copy or a reloaded pickle has its own model, anchors and phase, and needs a new optimizer: torch drops the
    hooks of a copied one.
    """

    def drift(self) -> dict[str, float]:
        """Return layer -> |w - w0| / |w0| over its parameters from the source; fresh layers are left out."""
        self.restore_weights()
        self.bound.parameters()
        return self.bound.anchors.drift(self.plan, self.model)

    def state_dict(self) -> dict[str, Any]:
        """Return what restores this adaptation, beside the model's and the optimizer's own state dicts."""
        return _state.state_dict(self.bound)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore plan facts, anchors, measurements, phase and frozen parameters, by name.

        Raises:
            PlanError: the state belongs to another plan; the message names the first row that differs.
        """
        _state.load_state_dict(self.bound, state)

    def __deepcopy__(self, memo: dict[int, Any]) -> Adaptation:
        copied = object.__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update(self.__dict__, bound=deep_copy(self.bound, memo))  # a transfer's report never changes
        return copied

    def _repr_html_(self) -> str:
        return fragment(self.plan._repr_html_(), title=f"Adaptation of {type(unwrap(self.model)).__name__}")

    def __repr__(self) -> str:
        total = self.plan.totals()
        return f"<Adaptation of {type(unwrap(self.model)).__name__}: {total['trained']:,} of {total['all']:,} trained>"
