"""WiSE-FT: once training is over, weights between the source's and what was trained."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from conservtl.conserve.weight_path import BestInterpolation, Interpolation
from conservtl.plan import Plan
from conservtl.strategies.base import Strategy

__all__ = ["WeightInterpolation"]


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
        return plan.with_after(Interpolation(by=self.label, t=self.t, batch_norm=self.batch_norm))
