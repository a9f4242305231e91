"""State dicts of an adaptation, by name, checked against the plan and the source they are loaded into."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import zip_longest
from typing import Any

from pydantic import ValidationError
from torch import nn

from conservtl.adaptation.bound_plan import BoundPlan
from conservtl.errors import PlanError
from conservtl.plan.plan import Plan
from conservtl.plan.row import Row
from conservtl.plan.upgrade import decayed_by_default
from conservtl.runtime.anchors import differs
from conservtl.spec_model import FrozenModel

__all__ = ["load_state_dict", "state_dict"]


def state_dict(bound: BoundPlan) -> dict[str, Any]:
    """Return the plan, anchors, phase, measurements, the updates' state and the endings done."""
    bound.restore_weights()
    return {
        **bound.anchors.state_dict(bound.model),
        "phase": bound.phase,
        "plan": bound.plan.model_dump(mode="json"),
        "measured": {name: dict(tensors) for name, tensors in bound.measured.items()},
        "updates": bound.updates.state_dict(),
        "finished": dict(bound.endings.done),
    }


def load_state_dict(bound: BoundPlan, state: Mapping[str, Any]) -> None:
    """Restore a state that ``state_dict`` returned."""
    try:
        plan, phase, start = Plan(**state["plan"]), state["phase"], state["start"]
    except (KeyError, TypeError, ValidationError) as error:
        raise PlanError(f"this is no state of an adaptation: {error}. Load what state_dict() gave.") from error
    if plan.facts != bound.plan.facts:
        bound.replan(**plan.facts)
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
    source = bound.origin.source_model
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
