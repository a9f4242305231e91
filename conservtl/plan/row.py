"""A row of the plan: one parameter and what is decided about it; and a phase, a stretch of training."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from conservtl.bounds import Count, NonNegative, Positive, Share
from conservtl.errors import PlanError
from conservtl.spec_model import FrozenModel

__all__ = ["COLUMNS", "Anneal", "Choice", "Length", "Phase", "Row", "changed", "check_row"]

COLUMNS: dict[str, tuple[str, ...]] = {
    "origin": ("origin", "reason"),
    "frozen": ("frozen",),
    "rate": ("lr", "scale"),
    "pull": ("pull",),
    "decay": ("decay",),
    "weight_decay": ("weight_decay",),
    "statistics": ("statistics",),
}
"""The decisions about a row, each with the fields that hold it."""


class Choice(FrozenModel):
    """Which strategy filled in a column of a row, and whether it named the row or meant everything."""

    by: str
    explicit: bool


class Anneal(FrozenModel):
    """A factor on a pull that changes over the optimizer's steps, from ``start`` to ``end``."""

    steps: Count
    """linear: over how many steps. sigmoid: the step at which it is half way."""
    start: NonNegative = 1.0
    """Factor at the first step."""
    end: NonNegative = 0.0
    """Factor at the end; it stays there."""
    shape: Literal["linear", "sigmoid"] = "linear"
    """linear, or 1 / (1 + exp(-rate (t - steps))), as RecAdam's."""
    rate: Positive = 0.05
    """How steep the sigmoid is, for each step."""

    def factor(self, step: int) -> float:
        """The factor at a step, counted from 0.

        Reference:
            Chen et al. 2020, "Recall and Learn: Fine-tuning Deep Pretrained Language Models with Less Forgetting",
            equation 6.
        """
        if self.shape == "linear":
            done = min(1.0, step / self.steps)
        else:
            done = 1 / (1 + math.exp(min(700.0, -self.rate * (step - self.steps))))
        return self.start + (self.end - self.start) * done


class Row(FrozenModel):
    """What happens to one parameter."""

    name: str
    """Canonical parameter name: wrapper prefixes stripped, tied parameters under their first name."""
    layer: str
    """The layer it belongs to."""
    depth: Share
    """0 at the input side, 1 at the output side; counted over all layers, frozen ones included."""
    shape: tuple[int, ...]
    kind: Literal["weight", "bias", "norm"]
    """norm: owned by a normalisation; weight: any other with two dimensions or more; bias: the rest."""
    source_shape: tuple[int, ...] | None = None
    """Shape of the source tensor of this name, None where the source has none."""
    added: bool = False
    """Whether a strategy added it to the model, as the identity: it is fresh, but there is nothing it should have been
    copied from."""
    origin: Literal["source", "fresh"] = "source"
    reason: str | None = None
    """Why it is fresh; None for a row from the source."""
    frozen: bool = False
    """Frozen throughout; phases can freeze more for a while."""
    lr: Positive | None = None
    """Absolute learning rate; None takes the optimizer's own, times ``scale``."""
    scale: Positive = 1.0
    """Ratio to the optimizer's own learning rate; used where ``lr`` is None."""
    pull: NonNegative | None = None
    """alpha: strength of the pull toward the source value; None: not covered."""
    decay: NonNegative | None = None
    """beta: strength of the pull of a fresh parameter toward zero; None: not covered."""
    weight_decay: bool = True
    """Whether the optimizer's own weight decay may act on it."""
    statistics: Literal["follow", "hold"] = "follow"
    """Of a norm that tracks statistics: whether they follow the batches it is trained on, or stand still."""
    chosen: dict[str, Choice] = Field(default_factory=dict)
    """Column -> the strategy that filled it in; a column not here holds its default."""

    @property
    def size(self) -> int:
        """Number of elements."""
        product = 1
        for length in self.shape:
            product *= length
        return product

    def rate(self, base: float) -> float:
        """Learning rate, given the optimizer's own ``base`` rate."""
        return self.lr if self.lr is not None else self.scale * base


Length = Count | Annotated[float, Field(gt=0, lt=1)]
"""A number of epochs, or a share of a run's."""


class Phase(FrozenModel):
    """A stretch of training: for how long, what is frozen meanwhile, and a scale on the rates."""

    name: str = "all"
    epochs: Length | None = None
    """A number of epochs, or a share of the run's; None: as long as training goes on (the last phase only)."""
    frozen: tuple[str, ...] = ()
    """Parameters frozen during this phase, beside those frozen throughout."""
    scale: Positive = 1.0
    """Multiplies every learning rate."""

    def length(self, epochs: int) -> int | None:
        """How many epochs it takes of a run of so many; None: what is left."""
        return max(1, round(self.epochs * epochs)) if isinstance(self.epochs, float) else self.epochs

    @property
    def lasts(self) -> str:
        """How long, in words."""
        if self.epochs is None:
            return "to the end"
        if isinstance(self.epochs, float):
            return f"{100 * self.epochs:g} % of the epochs"
        return f"{self.epochs} epoch{'s' * (self.epochs > 1)}"


def changed(row: Row, by: str, fields: dict[str, Any]) -> Row:
    """The row with other fields, validated as a new one is."""
    try:
        return Row(**{**dict(row), **fields})
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise PlanError(
            f"{by} gives {row.name!r} {field}={first['input']!r}, which no row can hold: {first['msg']}. "
            "Correct the strategy's fields."
        ) from error


def check_row(row: Row) -> None:
    """Hold one row to its invariants.

    Raises:
        PlanError: one does not hold.
    """
    if (row.origin == "fresh") != (row.reason is not None):
        raise PlanError(f"plan: {row.name!r} is {row.origin} with reason {row.reason!r}; only fresh rows have one.")
    if row.origin == "fresh" and row.pull is not None:
        raise PlanError(f"plan: {row.name!r} is fresh, so there is no source value to pull it to.")
    if row.origin == "source" and row.decay is not None:
        raise PlanError(f"plan: {row.name!r} comes from the source; beta acts on fresh parameters only.")
    if row.origin == "source" and row.source_shape != row.shape:
        raise PlanError(f"plan: {row.name!r} has shape {row.shape}, its source {row.source_shape}.")
