"""Several strategies on one model: apply them to a plan, let them extend the model, take the extensions away."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from conservtl.errors import PlanError, SelectorError, SpecError
from conservtl.layers import find_layers, matches
from conservtl.methods.base import Strategy
from conservtl.plan.decision import Extension
from conservtl.plan.penalty import Penalty
from conservtl.plan.plan import Plan
from conservtl.plan.update import Update

__all__ = ["apply_all", "extend_all", "record_all", "retract_all", "void_notes"]


def apply_all(plan: Plan, strategies: Iterable[Strategy], extensions: Iterable[Extension] = ()) -> Plan:
    """Return the plan after all strategies, applied by their ``order``; their place in the list does not matter.

    Args:
        plan: the plan before any strategy.
        strategies: in any order.
        extensions: of an earlier run, part of the source's function; kept unless a strategy decides about their kind.

    Raises:
        SelectorError: a glob of a strategy matches nothing; the message names the strategy.
        PlanError: two strategies contradict each other, or are equal.
    """
    strategies = list(strategies)
    for strategy in sorted(strategies, key=lambda strategy: (strategy.order, strategy.kind, repr(strategy))):
        try:
            plan = strategy.apply(plan)
        except SelectorError as error:
            raise SelectorError(f"{strategy.label}: {error}") from None
    if twice := [strategy for place, strategy in enumerate(strategies) if strategy in strategies[:place]]:
        raise PlanError(f"{twice[0].label} stands twice with the same fields. Leave one of the two out.")
    decided = {extension.name for extension in plan.extensions}
    for extension in extensions:
        if extension.name not in decided:
            plan = plan.with_extension(extension)
    _check_factors(plan)
    return plan


def void_notes(plan: Plan) -> list[str]:
    """Return a note on each penalty, update and comparison of features that acts on nothing that is trained."""
    trained = set(plan.trained)
    places = {layer: place for place, layer in enumerate(plan.layers)}
    first = min((places[plan[name].layer] for name in trained), default=0)
    acting: tuple[Penalty | Update, ...] = (*plan.penalties, *plan.updates)
    notes = [
        f"{decision.by} acts on nothing: all parameters that its {decision.kind} covers are frozen"
        for decision in acting
        if not plan.factors and trained.isdisjoint(decision.names)
    ]
    return notes + [
        f"{term.by} adds nothing: no layer up to those that it compares is trained"
        for term in plan.terms
        if type(term).source and term.taps and not term.enters and all(places[tap] < first for tap in term.taps)
    ]


def _check_factors(plan: Plan) -> None:
    """Raise if factors of low rank, or what acts on weights beside them, come to nothing."""
    factors, trained = plan.factors.keys(), set(plan.trained)
    if not factors:
        return
    choices = {name: plan[name].chosen.get("frozen") for name in factors}
    freezing = next((choice.by for choice in choices.values() if choice is not None), None)
    if freezing is not None and trained.isdisjoint(factors):
        raise SpecError(
            f"{freezing} freezes all factors of low rank, so that no weight changes by them. Leave one of the two "
            "strategies out, or give factors to a layer that it trains (on of LoRA, target_modules of PEFT)."
        )
    on_factors = {penalty.by for penalty in plan.penalties if not factors.isdisjoint(penalty.names)}
    for decision in (*plan.updates, *plan.penalties, *plan.after):
        names = getattr(decision, "names", None)
        decays = getattr(decision, "column", None) == "decay"
        if names is not None and trained.isdisjoint(names) and not decays and decision.by not in on_factors:
            raise SpecError(
                f"{decision.by} acts on trained weights from the source, and under an adapter they are frozen: factors "
                "of low rank (LoRA) are trained instead. Leave one of the two out, or use L2SP, which acts on the "
                "merged weights."
            )


def record_all(plan: Plan, strategies: Iterable[Strategy]) -> Plan:
    """Return the plan, before any strategy, with the facts that strategies record about what they added."""
    for strategy in strategies:
        plan = strategy.record(plan)
    return plan


def extend_all(
    model: nn.Module,
    strategies: Iterable[Strategy],
    example: Any = None,
    layers: Sequence[str] | None = None,
    head: Sequence[str] | None = None,
) -> tuple[dict[str, str], Sequence[str] | None]:
    """Let strategies extend a model in place: all of them, or none if one raises.

    Args:
        model: wrapped or not.
        strategies: extended in this order.
        example: an example input, or None.
        layers: globs that the caller cuts the model into layers by, or None.
        head: globs of the head, or None.

    Returns:
        Name of each added parameter -> its description; and ``layers`` with the added modules that no glob matches
        (an input transform, for example) in front.
    """
    added: dict[str, str] = {}
    extended: list[Strategy] = []
    try:
        for strategy in (strategy for strategy in strategies if strategy.extends):
            new = strategy.extend(model, find_layers(model, example, layers, head), example)
            extended.append(strategy)
            added |= new
            if layers is not None:
                unmatched = [name for name in new if not any(matches(glob, name) for glob in layers)]
                layers = [*dict.fromkeys(name.rpartition(".")[0] for name in unmatched), *layers]
    except BaseException:
        retract_all(model, extended)
        raise
    return added, layers


def retract_all(model: nn.Module, strategies: Iterable[Strategy]) -> None:
    """Remove from a model what strategies added to it."""
    for strategy in strategies:
        strategy.retract(model)
