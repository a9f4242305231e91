"""WiSE-FT: once training is over, weights between the source's and what was trained."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from conservtl.errors import SpecError
from conservtl.methods.base import Aliases, Strategy
from conservtl.plan.decision import After, FinishContext
from conservtl.plan.plan import Plan
from conservtl.weights.interpolation import Statistics
from conservtl.weights.path import WeightPath
from conservtl.weights.recompute_bn import recompute_statistics

__all__ = ["BestInterpolation", "FixedInterpolation", "WeightInterpolation"]


Share = Annotated[float, Field(ge=0, le=1)]
Points = Annotated[int, Field(ge=2)]


class FixedInterpolation(After):
    """Weights at one point between their start and what was trained."""

    kind: Literal["weight_interpolation"] = "weight_interpolation"
    interpolates: ClassVar[bool] = True
    t: Share
    """0 is the start, 1 what was trained."""
    batch_norm: Statistics | Literal["recompute"] = "interpolate"
    """What becomes of running means and variances."""

    def describe(self) -> str:
        """Where it ends."""
        return f"weights at {self.t:g} of the way from the start to what was trained (statistics: {self.batch_norm})"

    def finish(self, ending: FinishContext) -> dict[str, Any]:
        """Move there."""
        _line(ending, self.batch_norm, self.by).move(self.t)
        return {"t": self.t}


class BestInterpolation(After):
    """Weights at the best point between their start and what was trained, by the validation part."""

    kind: Literal["best_weight_interpolation"] = "best_weight_interpolation"
    points: Points = 11
    """How many are tried."""
    batch_norm: Statistics | Literal["recompute"] = "interpolate"
    """What becomes of running means and variances."""

    interpolates: ClassVar[bool] = True
    scored: ClassVar[bool] = True

    @property
    def name(self) -> str:
        """That of the other, for a plan can hold one of them."""
        return "weight_interpolation"

    def describe(self) -> str:
        """Where it ends."""
        return (
            f"weights at the best of {self.points} points from the start to what was trained, by the validation part "
            f"(statistics: {self.batch_norm})"
        )

    def finish(self, ending: FinishContext) -> dict[str, Any]:
        """Try them all, and move to the best."""
        if ending.score is None:
            raise SpecError(f"{self.by} chooses on a validation part: pass score, or give fit valid={{...}}.")
        best, scores = _line(ending, self.batch_norm, self.by).choose(self.points, ending.score, ending.margin)
        return {"t": best, "scores": [{"t": t, "score": score} for t, score in scores.items()]}


def _line(ending: FinishContext, batch_norm: Statistics | Literal["recompute"], by: str) -> WeightPath:
    """The line of a training that is over."""
    if batch_norm != "recompute":
        return WeightPath(ending.model, ending.start, batch_norm)
    batches = ending.batches
    if batches is None:
        raise SpecError(
            f"{by} recomputes statistics on the training data: pass its batches, finish(batches), or choose another "
            "batch_norm."
        )
    return WeightPath(
        ending.model,
        ending.start,
        refresh=lambda: recompute_statistics(ending.model, batches, ending.forward),
    )


class WeightInterpolation(Strategy):
    r"""Train as the other strategies say, then go part of the way back to the source.

    .. math:: w = (1 - t)\, w^0 + t\, w^1

    with w0 the weights that came from the source and w1 what became of them. What is new stays as trained, and so do
    integer buffers. t has no scale to tune with the rate, the batch or the model: 0 is the source, 1 no interpolation.

    Measured with its defaults against plain fine-tuning at 1e-4, in points of the harmonic mean of both domains, for a
    new speaker with one and five recordings a word and for corrupted images: +0.6 ± 0.3, +0.3 ± 0.3 and +1.8 ± 0.5
    (benchmarks/results/methods.md).

    Cost: nothing while training. With ``t=None``, ``points`` evaluations of the validation part, and a copy of the
    weights meanwhile.

    Reference:
        Wortsman et al. 2022, "Robust fine-tuning of zero-shot models", section 3.
    """

    kind: Literal["weight_interpolation"] = "weight_interpolation"
    aliases: ClassVar[Aliases] = {"wise_ft": {}}
    t: Annotated[float, Field(ge=0, le=1)] | None = 0.7
    """How far from the source (0) to the trained weights (1). None: the best on the validation part, the middle of
    those that are equal but for half an example."""
    points: Annotated[int, Field(ge=2)] = 11
    """How many values of t are tried where none is given, evenly spaced, both ends included."""
    batch_norm: Literal["interpolate", "adapted", "source", "recompute"] = "interpolate"
    """Running means and variances: interpolated too; those after training or those of the source, as they are; or
    computed anew on the training data, for every t but the two ends, which serves the target at the source's cost."""

    def apply(self, plan: Plan) -> Plan:
        """Add what is done once training is over."""
        if self.t is None:
            return plan.with_after(BestInterpolation(by=self.label, points=self.points, batch_norm=self.batch_norm))
        return plan.with_after(FixedInterpolation(by=self.label, t=self.t, batch_norm=self.batch_norm))
