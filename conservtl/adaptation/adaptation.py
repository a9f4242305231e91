"""The adaptation: a model with its plan, as a user trains it, and its state dict, checked where it is loaded."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import zip_longest
from typing import Any

from pydantic import ValidationError
from torch import nn

from conservtl.adaptation._finishing import FinishingMethods
from conservtl.adaptation._loop import LoopMethods
from conservtl.adaptation._measurements import MeasurementMethods
from conservtl.errors import PlanError
from conservtl.fragments import fragment
from conservtl.layers import unwrap
from conservtl.layers.copying import deep_copy
from conservtl.plan.plan import Plan
from conservtl.plan.row import Row
from conservtl.plan.upgrade import decayed_by_default
from conservtl.runtime.anchors import differs
from conservtl.spec_model import FrozenModel

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
        bound = self.bound
        self.restore_weights()
        return {
            **bound.anchors.state_dict(bound.model),
            "phase": bound.phase,
            "plan": bound.plan.model_dump(mode="json"),
            "measured": {name: dict(tensors) for name, tensors in bound.measured.items()},
            "updates": bound.updates.state_dict(),
            "finished": dict(bound.endings.done),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore plan facts, anchors, measurements, phase and frozen parameters, by name.

        Raises:
            PlanError: the state belongs to another plan; the message names the first row that differs.
        """
        bound = self.bound
        try:
            plan, phase, start = Plan(**state["plan"]), state["phase"], state["start"]
        except (KeyError, TypeError, ValidationError) as error:
            raise PlanError(f"this is no state of an adaptation: {error}. Load what state_dict() gave.") from error
        if plan.facts != bound.plan.facts:
            self.replan(**plan.facts)
        now = _with_weight_decay(bound.plan, decayed_by_default(state["plan"]))
        plan = _with_weight_decay(plan, decayed_by_default(state["plan"]))
        plan, expected = _without_reasons(plan), _without_reasons(now)
        if plan != expected:
            raise PlanError(
                f"this state belongs to another plan: {_difference(plan, expected)}. Load it into an adaptation "
                "made from the same model, source and strategies."
            )
        if not bound.anchors.fits(state):
            raise PlanError("this state's anchors are not those of this adaptation. Load what state_dict() gave.")
        source = self.origin.source_model
        if isinstance(source, nn.Module) and (moved := differs(source, start, plan)):
            raise PlanError(
                f"this state belongs to another source model: it began with other values in {moved!r}. Load it into an "
                "adaptation made from the same source."
            )
        bound.plan = now
        bound.anchors.load_state_dict(state, bound.model)
        bound.measured = {name: dict(tensors) for name, tensors in state["measured"].items()}
        bound.updates.load_state_dict(state["updates"])
        bound.start_phase(phase)
        bound.endings.done = dict(state.get("finished", {}))

    def __deepcopy__(self, memo: dict[int, Any]) -> Adaptation:
        copied = object.__new__(type(self))
        memo[id(self)] = copied
        # A transfer's report never changes.
        copied.__dict__.update(self.__dict__, bound=deep_copy(self.bound, memo), _origin=deep_copy(self.origin, memo))
        return copied

    def _repr_html_(self) -> str:
        return fragment(self.plan._repr_html_(), title=f"Adaptation of {type(unwrap(self.model)).__name__}")

    def __repr__(self) -> str:
        total = self.plan.totals()
        return f"<Adaptation of {type(unwrap(self.model)).__name__}: {total['trained']:,} of {total['all']:,} trained>"


def _with_weight_decay(plan: Plan, names: Collection[str]) -> Plan:
    """Return the plan with the optimizer's weight decay on these biases and norms, unless a strategy decides about it.

    It acted on them by default when the state was saved, and the run goes on as it began.
    """
    decayed = {name for name in names if name in plan and "weight_decay" not in plan[name].chosen}
    rows = (row.model_copy(update={"weight_decay": True}) if row.name in decayed else row for row in plan.rows)
    return Plan(**{**dict(plan), "rows": tuple(rows)}) if decayed else plan


def _without_reasons(plan: Plan) -> Plan:
    """Return the plan without what only explains it, which may differ between versions; to compare, unchecked."""
    rows = []
    for row in plan.rows:
        chosen = {column: choice for column, choice in row.chosen.items() if column != "weight_decay"}
        plain = {"reason": None, "found": "trained", "aliases": (), "chosen": chosen}
        rows.append(Row.model_construct(**dict(row) | plain))
    return Plan.model_construct(**dict(plan) | {"rows": tuple(rows)})


def _difference(plan: Plan, expected: Plan) -> str:
    """Return the first row, or else the first field, in which two plans differ, with the values of both."""
    theirs, own = ({row.name: row for row in one.rows} for one in (plan, expected))
    for name in (*theirs, *own):
        if (name in own) != (name in theirs):
            return f"{name!r} differs: {'the state' if name in theirs else 'this adaptation'} alone has it"
    for name in theirs:
        if theirs[name] != own[name]:
            return f"{name!r} differs: {_values(theirs[name], own[name])}"
    field = _first(plan, expected)
    pair = getattr(plan, field), getattr(expected, field)
    if isinstance(pair[0], tuple):
        pair = next((one, other) for one, other in zip_longest(*pair) if one != other)
    return f"its {field} differs: {_values(*pair)}"


def _values(one: Any, other: Any) -> str:
    """Return both values, of the first field in which they differ if they are of one kind."""
    if isinstance(one, FrozenModel) and type(one) is type(other):
        field = _first(one, other)
        return f"{field} is {_values(getattr(one, field), getattr(other, field))}"
    return f"{one!r:.120} in the state and {other!r:.120} here"


def _first(one: FrozenModel, other: FrozenModel) -> str:
    """Return the first field in which two models of one class differ, ``chosen`` last."""
    fields = sorted(type(one).model_fields, key=lambda name: name == "chosen")
    return next(name for name in fields if getattr(one, name) != getattr(other, name))
