"""Which block to train: what surgical fine-tuning asks before it can freeze the rest."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from conservtl.decision import Measure, Probe
from conservtl.errors import SpecError

__all__ = ["FACT", "BestBlock"]

FACT = "surgical_block"
"""The plan's fact that says which block was chosen."""


class BestBlock(Measure):
    """The block that, trained alone, does best on the validation part."""

    kind: Literal["best_block"] = "best_block"
    candidates: tuple[str, ...]
    """Blocks to try: layers, or globs of layers."""
    epochs: Annotated[int, Field(ge=1)] | None = None
    """Length of each trial; None: a fifth of the run's, at least one."""

    tried: ClassVar[bool] = True

    @property
    def remedy(self) -> str:
        """What to call in a loop of one's own."""
        return "Call conservtl.best_block(adaptation, train, valid) before optimizer(...), or name the block."

    def describe(self) -> str:
        """One line for the plan's table."""
        length = "a fifth of the epochs" if self.epochs is None else f"{self.epochs} epoch{'s' * (self.epochs > 1)}"
        return f"each of {len(self.candidates)} blocks trained alone for {length}; the best on validation is chosen"

    def compute(self, probe: Probe) -> dict[str, Tensor]:  # noqa: ARG002
        """No measurement: ``best_block`` tries them."""
        raise SpecError(f"{self.by}: the best block is not measured but tried. {self.remedy}")
