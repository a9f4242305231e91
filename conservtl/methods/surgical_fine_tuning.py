"""Surgical fine-tuning: one block is trained, the rest stands still."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from conservtl.errors import PlanError, SpecError
from conservtl.layers import select
from conservtl.methods.base import Order, Strategy, TestFields
from conservtl.plan.decision import Search
from conservtl.plan.plan import Plan

__all__ = ["FACT", "BestBlock", "SurgicalFineTuning"]


FACT = "surgical_block"
"""The plan's fact that says which block was chosen."""


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
        """One line for the plan's table."""
        length = "a fifth of the epochs" if self.epochs is None else f"{self.epochs} epoch{'s' * (self.epochs > 1)}"
        return f"each of {len(self.candidates)} blocks trained alone for {length}; the best on validation is chosen"

    def trials(self) -> dict[str, dict[str, str]]:
        """Each block with the fact that chooses it."""
        return {block: {FACT: block} for block in self.candidates}


Place = Annotated[int, Field(strict=True)]
Globs = Annotated[tuple[str, ...], Field(min_length=1)]


class SurgicalFineTuning(Strategy):
    """Train one block of what came from the source, and freeze everything else throughout.

    Which block is best depends on where the domains differ: the first where inputs are corrupted, a middle one where
    the classes' appearance changes, the last where the labels do. ``block="best"`` finds out: each candidate is
    trained alone from the same start, and scored on the validation part, which must be there. ``fit`` does this before
    it trains, and ``best_block`` in a loop of your own; the plan then says which one it was.

    A position is one layer of the plan; what the paper calls a block is a stage of several, so name it where a layer
    is small: ``block="layer1.*"``, ``candidates=["layer1.*", "layer2.*", ...]``. Whatever is fresh is trained in any
    case, and the frozen norms keep the source's statistics.

    Measured with its defaults against plain fine-tuning at 1e-4, in points of the harmonic mean of both domains, for a
    new speaker with one and five recordings a word and for corrupted images: -0.8 ± 0.6, -0.8 ± 0.6 and -13.9 ± 4.0
    (benchmarks/results/methods.md). So the default loses to it; on images it is the first convolution alone, and the
    first stage alone, at 1e-3, has +1.1 ± 0.8.

    Cost: less than plain fine-tuning; with ``best``, a trial for each candidate before.

    Raises:
        SpecError: the position is not one of the body's.
        SelectorError: a glob matches no layer.

    Reference:
        Lee et al. 2022, "Surgical fine-tuning improves adaptation to distribution shifts", section 2.
    """

    kind: Literal["surgical_fine_tuning"] = "surgical_fine_tuning"
    order: ClassVar[Order] = Order.HEAD
    test_fields: ClassVar[TestFields] = (
        {"block": [range(3), "first", "last", str], "candidates": None, "trial_epochs": None},
    )
    block: Place | str = "first"
    """A glob of layers (a stage: ``layer1.*``); a position in the body, 0 at the input side, -1 the last before the
    head; ``first`` and ``last`` for these two; or ``best``, chosen on the validation part."""
    head: bool = False
    """Whether the head is trained too where it came from the source."""
    candidates: Globs | None = None
    """Globs of layers to choose from, each a block; None: every layer. For ``best``."""
    trial_epochs: Annotated[int, Field(ge=1)] | None = None
    """Length of each trial; None: a fifth of the run's epochs. For ``best``."""

    @model_validator(mode="after")
    def _only_for_best(self) -> Self:
        given = [name for name in ("candidates", "trial_epochs") if getattr(self, name) is not None]
        if given and self.block != "best":
            raise ValueError(f"{given[0]} is for block='best'; received block={self.block!r}: leave one of them out")
        return self

    def apply(self, plan: Plan) -> Plan:
        """Freeze all but the block; or ask which one, while nobody knows."""
        block = self.block
        if block == "best":
            candidates = self._candidates(plan)
            known = plan.facts.get(FACT)
            if known is None:
                return plan.with_search(BestBlock(by=self.label, candidates=candidates, epochs=self.trial_epochs))
            if known not in candidates:
                raise PlanError(f"{self.label}: {known!r} is none of its candidates {candidates}.")
            block = known
        trained = self._layers(plan, block)
        kept = {*plan.fresh, *(plan.head if self.head else ())}
        frozen = {row.name: {"frozen": True} for row in plan.rows if row.layer not in trained and row.name not in kept}
        return plan.choose(self.label, "frozen", frozen, explicit=False)

    def _layers(self, plan: Plan, block: int | str) -> frozenset[str]:
        """The layers of a block."""
        place = {"first": 0, "last": -1}.get(block, block) if isinstance(block, str) else block
        if isinstance(place, str):
            return frozenset(select([place], plan.layers, "layer")[place])
        body = self._body(plan)
        if not -len(body) <= place < len(body):
            raise SpecError(
                f"{self.label}: block={place} must be a position in the body of {len(body)} layers "
                f"({', '.join(body)}), {-len(body)} to {len(body) - 1}."
            )
        return frozenset({body[place]})

    def _candidates(self, plan: Plan) -> tuple[str, ...]:
        if self.candidates is not None:
            select(self.candidates, plan.layers, "layer")
            return self.candidates
        trained_anyway = set(plan.new) if self.head or plan.fresh else set()
        free = [row for row in plan.rows if not row.frozen and row.name not in trained_anyway]
        return tuple(dict.fromkeys(row.layer for row in free))

    @staticmethod
    def _body(plan: Plan) -> tuple[str, ...]:
        """Layers from the source, without the one that holds the head."""
        head = plan[plan.head[0]].layer
        rows = [row for row in plan.rows if row.origin == "source"]
        return tuple(dict.fromkeys(row.layer for row in rows if row.layer != head)) or plan.layers
