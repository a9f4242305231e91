"""Plans that an adapter cannot carry out, refused before training."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from conservtl.adaptation.adaptation import Adaptation
from conservtl.errors import SpecError
from conservtl.integrations.peft.lora import Pair
from conservtl.methods import Strategy
from conservtl.methods.l2_sp import L2SP, L2Penalty, MergedL2Penalty
from conservtl.plan.penalty import Penalty
from conservtl.plan.plan import Plan
from conservtl.plan.update import Update

__all__ = ["check_biases", "check_plan"]


def check_biases(pairs: Sequence[Pair], strategies: Iterable[Strategy]) -> None:
    """Raise if L2SP is to act on biases too and B has one: it acts on the products of A and B alone.

    Raises:
        SpecError: the message names the bias.
    """
    bias = next((pair.bias for pair in pairs if pair.bias is not None), None)
    if bias is not None and any(isinstance(one, L2SP) and one.on == "all" for one in strategies):
        raise SpecError(
            f"L2SP(on='all'): {bias!r} of the adapter changes the model otherwise than by B A, so L2SP cannot act on "
            "it. Leave on='all' out, or lora_bias in LoraConfig."
        )


def check_plan(adaptation: Adaptation, pairs: Sequence[Pair] | None, reason: SpecError | None) -> None:
    """Raise unless a plan can be carried out on a model with an adapter."""
    plan = adaptation.plan
    trained = set(plan.trained)
    _check_acting(plan, trained)
    if reason is not None and plan.after:
        raise reason
    for pair in pairs or ():
        if (pair.a in trained) != (pair.b in trained) and any(isinstance(p, MergedL2Penalty) for p in plan.penalties):
            raise SpecError(
                f"{pair.module!r}: L2SP acts on the product of A and B, but one of the two is frozen. Train both."
            )
    if merged := next((one for one in plan.penalties if isinstance(one, MergedL2Penalty)), None):
        _check_covered(plan, merged, trained)
    sourced = [term.by for term in plan.terms if term.source]
    if sourced:
        _check_source(plan, sourced[0], trained)
    heads = [term.by for term in plan.terms if term.heads]
    if heads and any(".modules_to_save." in name for name in plan.possible_head):
        raise SpecError(
            f"{heads[0]} compares outputs, but the head is trained as a module of its own (modules_to_save), so the "
            "source has none for these labels. Compare features (FeatureConservation), or leave the head out of "
            "modules_to_save."
        )


def _check_acting(plan: Plan, trained: set[str]) -> None:
    acting: tuple[Penalty | Update, ...] = (*plan.penalties, *plan.updates)
    for decision in acting:
        if isinstance(decision, L2Penalty) or trained.intersection(decision.names):
            continue
        raise SpecError(
            f"{decision.by} acts on trained weights from the source; under an adapter they are frozen. Leave it out, "
            "or use L2SP, which acts on the merged weights."
        )


def _check_covered(plan: Plan, merged: MergedL2Penalty, trained: set[str]) -> None:
    """Raise if the adapter has trained weights that change the base otherwise than by B A."""
    for name in sorted(trained):
        row = plan[name]
        pulled = row.kind == "weight" or any(name in penalty.names for penalty in plan.penalties)
        if row.origin == "source" or not pulled or name in merged.names or ".modules_to_save." in name:
            continue
        if "lora_" in name or "trainable_tokens" in name or "prompt_encoder" in name:
            raise SpecError(
                f"{merged.by}: {name!r} of the adapter changes the model otherwise than by B A, so L2SP cannot act on "
                "it. Leave L2SP or that part of the adapter out."
            )


def _check_source(plan: Plan, by: str, trained: set[str]) -> None:
    """Raise if the model without its adapter is not the source after training."""
    moved = [name for name in sorted(trained) if plan[name].origin == "source"]
    moved += [row.name for row in plan.rows if row.added]
    if moved:
        raise SpecError(
            f"{by} compares with the source, the model with its adapter off, but {moved[0]!r} outside the adapter is "
            "trained too. Freeze it (bias='none' in LoraConfig), or compare nothing."
        )
