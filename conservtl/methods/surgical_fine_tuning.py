"""Surgical fine-tuning: one block is trained, the rest is frozen."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from conservtl.bounds import Count
from conservtl.errors import PlanError, SpecError, counted
from conservtl.methods._rows import names_something, train_named
from conservtl.methods.base import Order, Strategy, TestFields
from conservtl.plan.decision import Search
from conservtl.plan.plan import Plan

__all__ = ["FACT", "BestBlock", "SurgicalFineTuning"]

FACT = "surgical_block"
"""Name of the plan's fact that holds the chosen block."""

Position = Annotated[int, Field(strict=True)]
Globs = Annotated[tuple[str, ...], Field(min_length=1)]


class SurgicalFineTuning(Strategy):
    """Train one block of the parameters from the source, and freeze all others throughout.

    The best block depends on the shift between the domains: the first for corrupted inputs, a middle one if the
    classes look different, the last for other labels. ``block="best"`` finds it: each candidate is trained alone from
    the same start and scored on the validation part, which is required. ``fit`` does so before it trains; in a loop of
    your own call ``best_block``. The plan then names the block.

    A position means one layer of the plan. A block of the paper is a stage of several layers: if layers are small,
    name it, ``block="layer1.*"``, ``candidates=["layer1.*", "layer2.*", ...]``. Fresh parameters are trained in any
    case, and frozen norms keep the source's statistics. Parameters that were frozen when the model was handed in are
    trained only if the block is named, or if they are the head's and ``head`` is True.

    Measured: docs/methods.md.

    Cost: less than plain fine-tuning; with ``best``, one trial for each candidate before.

    Hurts: where the chosen block cannot express the change, as the first convolution alone cannot for most
    corruptions.

    Raises:
        SpecError: the body has no such position.
        SelectorError: a glob matches no layer.

    Reference:
        Lee et al. 2022, "Surgical fine-tuning improves adaptation to distribution shifts", section 2.

    Example:
        >>> import torch, conservtl as ctl
        >>> source, model = (torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(4))) for _ in range(2))
        >>> plan = ctl.adapt(model, source, [ctl.SurgicalFineTuning(block=1)]).plan
        >>> plan.trained
        ('1.weight', '1.bias')
    """

    kind: Literal["surgical_fine_tuning"] = "surgical_fine_tuning"
    order: ClassVar[Order] = Order.HEAD
    test_fields: ClassVar[TestFields] = (
        {"block": [range(3), "first", "last", str], "candidates": None, "trial_epochs": None},
    )
    block: Position | str = "first"
    """A glob of layers (a stage: ``layer1.*``); a position in the body, 0 at the input side, -1 the last before the
    head; ``first`` or ``last`` for these two; or ``best``, chosen on the validation part."""
    head: bool = False
    """Whether a head from the source is trained too."""
    candidates: Globs | None = None
    """For ``best``: globs of layers, each a block to try. None: every layer."""
    trial_epochs: Count | None = None
    """For ``best``: length of each trial. None: a fifth of the run's epochs."""

    @model_validator(mode="after")
    def _only_for_best(self) -> Self:
        given = [name for name in ("candidates", "trial_epochs") if getattr(self, name) is not None]
        if given and self.block != "best":
            raise ValueError(f"{given[0]} is for block='best'; received block={self.block!r}: leave one of them out")
        return self

    def apply(self, plan: Plan) -> Plan:
        """Freeze all but the block, or add the search for it until its result is known."""
        block = self.block
        if block == "best":
            candidates = self._candidates(plan)
            best = plan.facts.get(FACT)
            if best is None:
                return plan.with_search(BestBlock(by=self.label, candidates=candidates, epochs=self.trial_epochs))
            if best not in candidates:
                raise PlanError(f"{self.label}: {best!r} is none of its candidates {candidates}.")
            block = best
        trained = self._layers(plan, block)
        free = {*plan.fresh, *(plan.head if self.head else ())}
        frozen = {row.name: {"frozen": True} for row in plan.rows if row.layer not in trained and row.name not in free}
        plan = plan.choose(self.label, "frozen", frozen, explicit=False)
        named = [row.name for row in plan.rows if row.layer in trained] if self._names(block) else []
        return train_named(plan, self.label, [*named, *(plan.head if self.head else ())])

    def _names(self, block: int | str) -> bool:
        """Return whether the user named the block, and not its position or all candidates."""
        if isinstance(block, int) or block in ("first", "last"):
            return False
        return names_something(block) and (self.block != "best" or self.candidates is not None)

    def _layers(self, plan: Plan, block: int | str) -> frozenset[str]:
        """Return the layers of a block."""
        place = {"first": 0, "last": -1}.get(block, block) if isinstance(block, str) else block
        if isinstance(place, str):
            return frozenset(plan.select_layers([place])[place])
        body = self._body(plan)
        if not -len(body) <= place < len(body):
            raise SpecError(
                f"{self.label}: block={place} must be a position in the body of {counted(len(body), 'layer')} "
                f"({', '.join(body)}), {-len(body)} to {len(body) - 1}."
            )
        return frozenset({body[place]})

    def _candidates(self, plan: Plan) -> tuple[str, ...]:
        if self.candidates is not None:
            plan.select_layers(self.candidates)
            return self.candidates
        trained_anyway = set(plan.new) if self.head or plan.fresh else set()
        free = [row for row in plan.rows if not row.frozen and row.name not in trained_anyway]
        return tuple(dict.fromkeys(row.layer for row in free))

    @staticmethod
    def _body(plan: Plan) -> tuple[str, ...]:
        """Return the layers from the source, without those of the head; an embedding tied to it is body."""
        head = {plan[name].layer for name in plan.head if name not in plan.tied_head}
        rows = [row for row in plan.rows if row.origin == "source"]
        return tuple(dict.fromkeys(row.layer for row in rows if row.layer not in head)) or plan.layers


class BestBlock(Search):
    """The block that, trained alone, does best on the validation part."""

    kind: Literal["best_block"] = "best_block"
    candidates: tuple[str, ...]
    """Blocks to try: layers, or globs of layers."""

    @property
    def remedy(self) -> str:
        """Sentence that says what to call in a training loop without ``fit``."""
        return "Call conservtl.best_block(adaptation, train, valid) before optimizer(...), or name the block."

    def describe(self) -> str:
        """Return one line for the plan's table."""
        length = "a fifth of the epochs" if self.epochs is None else counted(self.epochs, "epoch")
        blocks = counted(len(self.candidates), "block")
        return f"each of {blocks} trained alone for {length}; the best on validation is chosen"

    def trials(self) -> dict[str, dict[str, str]]:
        """Return each block with the fact that chooses it."""
        return {block: {FACT: block} for block in self.candidates}
