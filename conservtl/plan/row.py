"""A row of the plan, which holds the decisions about one parameter; and a phase, a stretch of training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from conservtl.bounds import Count, NonNegative, Positive, Share
from conservtl.errors import PlanError, counted
from conservtl.spec_model import FrozenModel

__all__ = ["COLUMNS", "Anneal", "Choice", "Length", "LowRank", "Phase", "Row", "changed", "like_bias"]

COLUMNS: dict[str, tuple[str, ...]] = {
    "origin": ("origin", "reason"),
    "frozen": ("frozen",),
    "rate": ("lr", "scale"),
    "pull": ("pull",),
    "decay": ("decay",),
    "weight_decay": ("weight_decay",),
    "statistics": ("statistics",),
    "low_rank": ("low_rank",),
}
"""Decision about a row -> the fields of the row that hold it."""


def like_bias(name: str, kind: str, shape: Sequence[int]) -> bool:
    """Return whether weight decay leaves a parameter alone by convention, unless it is asked for.

    Biases and norms are; and what acts as they do under another shape: tables of relative position biases, scales of
    channels (C, 1, 1), tokens (1, 1, C).
    """
    owner, _, last = name.rpartition(".")
    named = "bias" in last or owner.endswith("bias")
    return kind != "weight" or named or (len(shape) > 2 and sum(size > 1 for size in shape) <= 1)


class Choice(FrozenModel):
    """The strategy that filled in a column of a row."""

    by: str
    """Its name."""
    explicit: bool
    """Whether it named the row; if not, it filled in the column of all rows."""


class Anneal(FrozenModel):
    """A factor on a penalty that changes over the optimizer's steps, from ``start`` to ``end``."""

    steps: Count
    """linear: number of steps from start to end. sigmoid: the step at which the factor is half way."""
    start: NonNegative = 1.0
    """Factor at the first step."""
    end: NonNegative = 0.0
    """Factor at the end and afterwards."""
    shape: Literal["linear", "sigmoid"] = "linear"
    """linear: in equal steps. sigmoid: 1 / (1 + exp(-rate (t - steps))) of the way at step t, as in RecAdam."""
    rate: Positive = 0.05
    """Steepness of the sigmoid, per step."""

    def factor(self, step: int) -> float:
        """Return the factor at a step, counted from 0.

        Reference:
            Chen et al. 2020, "Recall and Learn: Fine-tuning Deep Pretrained Language Models with Less Forgetting",
            equation 6.
        """
        if self.shape == "linear":
            done = min(1.0, step / self.steps)
        else:
            done = 1 / (1 + math.exp(min(700.0, -self.rate * (step - self.steps))))
        return self.start + (self.end - self.start) * done


class LowRank(FrozenModel):
    """The change of a weight by scale × B A, in the row of B, which starts at 0."""

    a: str
    """Name of the parameter A."""
    weight: str
    """Name of the weight that is changed."""
    scale: Positive
    """Factor on the product, and on the bias of B."""
    bias: str | None = None
    """Name of the bias of B, which changes that of the weight's module; None: B has none."""


class Row(FrozenModel):
    """The decisions about one parameter."""

    name: str
    """Canonical parameter name: wrapper prefixes stripped, tied parameters under their first name."""
    layer: str
    """The layer it belongs to."""
    aliases: tuple[str, ...] = ()
    """Other names of the same tensor, if it is tied."""
    depth: Share
    """0 at the input side, 1 at the output side; counted over all layers, frozen ones included."""
    shape: tuple[int, ...]
    kind: Literal["weight", "bias", "norm"]
    """norm: owned by a normalisation; weight: any other with two dimensions or more; bias: the rest."""
    source_shape: tuple[int, ...] | None = None
    """Shape of the source tensor of this name; None if the source has none."""
    added: bool = False
    """Whether a strategy added it to the model. It is fresh, but no source could have held it."""
    origin: Literal["source", "fresh"] = "source"
    reason: str | None = None
    """Reason why it is fresh; None for a row from the source."""
    source_rows: tuple[int | None, ...] | None = None
    """For each index of its first dimension, that of the source from which it is copied, by label; None among them: a
    label that the source does not know, whose values are new. None: copied as it is."""
    found: Literal["trained", "frozen", "fixed"] = "trained"
    """State in which the model was handed in. frozen: it asked for no gradient (``requires_grad`` was False), so it is
    frozen throughout unless a strategy names it. fixed: its type has no gradient, so nothing trains it."""
    frozen: bool = False
    """Whether it is frozen throughout; phases can freeze more for a while."""
    lr: Positive | None = None
    """Absolute learning rate; None: ``scale`` times the optimizer's own."""
    scale: Positive = 1.0
    """Ratio to the optimizer's own learning rate; used if ``lr`` is None."""
    pull: NonNegative | None = None
    """alpha: strength of the pull toward the source value; None: no pull. A penalty of the plan carries it out."""
    decay: NonNegative | None = None
    """beta: strength of the pull of a fresh parameter, or of its new rows, toward zero; None: no pull. A penalty of the
    plan carries it out."""
    weight_decay: bool = True
    """Whether the optimizer's own weight decay may act on it. In a new plan it is False for biases, norms and what is
    like them."""
    statistics: Literal["follow", "hold"] = "follow"
    """Statistics of a norm that tracks them. follow: updated by training batches. hold: unchanged."""
    low_rank: LowRank | None = None
    """The change of a weight whose factor B it is; None: it is no such factor."""
    chosen: dict[str, Choice] = Field(default_factory=dict)
    """Column -> the strategy that filled it in; a column not here holds its default."""

    @property
    def new_rows(self) -> tuple[int, ...]:
        """Indices of its first dimension that the source has no values for, although it has for others."""
        return tuple(place for place, row in enumerate(self.source_rows or ()) if row is None)

    @property
    def unused_rows(self) -> tuple[int, ...]:
        """Indices of the source's first dimension from which nothing is copied, although it is from others."""
        rows = self.source_rows
        return (
            () if rows is None else tuple(place for place in range((self.source_shape or (0,))[0]) if place not in rows)
        )

    @property
    def fresh(self) -> bool:
        """Whether it holds values that do not come from the source: all of them, or new rows."""
        return self.origin == "fresh" or bool(self.new_rows)

    @property
    def as_found(self) -> bool:
        """Whether it is frozen because it was handed in so."""
        return self.frozen and self.found != "trained"

    @property
    def like_bias(self) -> bool:
        """Whether it is a bias, belongs to a norm, or acts as these do."""
        return like_bias(self.name, self.kind, self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        product = 1
        for length in self.shape:
            product *= length
        return product

    @property
    def copied_size(self) -> int:
        """Number of elements that come from the source."""
        if self.origin == "fresh":
            return 0
        return self.size if self.source_rows is None else self.size - self.size // self.shape[0] * len(self.new_rows)

    def rate(self, base: float) -> float:
        """Return the learning rate, given the optimizer's own ``base`` rate."""
        return self.lr if self.lr is not None else self.scale * base


Length = Count | Annotated[float, Field(gt=0, lt=1)]
"""A number of epochs, or a share of a run's."""


class Phase(FrozenModel):
    """A stretch of training: its length, the parameters frozen in it, and a scale on the rates."""

    name: str = "all"
    epochs: Length | None = None
    """A number of epochs, or a share of the run's; None: to the end of training (the last phase only)."""
    frozen: tuple[str, ...] = ()
    """Parameters frozen during this phase, beside those frozen throughout."""
    scale: Positive = 1.0
    """Factor on every learning rate."""

    def length(self, epochs: int) -> int | None:
        """Return its number of epochs in a run of ``epochs``; None: all that are left."""
        return max(1, round(self.epochs * epochs)) if isinstance(self.epochs, float) else self.epochs

    @property
    def lasts(self) -> str:
        """Its length in words."""
        if self.epochs is None:
            return "to the end"
        if isinstance(self.epochs, float):
            return f"{100 * self.epochs:g} % of the epochs"
        return counted(self.epochs, "epoch")


def changed(row: Row, by: str, fields: dict[str, Any]) -> Row:
    """Return the row with other fields, validated.

    Raises:
        PlanError: a row cannot hold a value.
    """
    try:
        return Row(**{**dict(row), **fields})
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise PlanError(
            f"{by} gives {row.name!r} {field}={first['input']!r}, which no row can hold: {first['msg']}. "
            "Correct the strategy's fields."
        ) from error
