"""WiSE-FT: after training, weights between the source's and the trained ones."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from conservtl.bounds import Share
from conservtl.errors import SpecError
from conservtl.methods.base import Aliases, Strategy
from conservtl.plan.decision import After, FinishContext
from conservtl.plan.plan import Plan
from conservtl.weights.interpolation import Statistics
from conservtl.weights.path import WeightPath
from conservtl.weights.recompute_bn import recompute_statistics

__all__ = ["BestInterpolation", "FixedInterpolation", "WeightInterpolation"]

Points = Annotated[int, Field(ge=2)]
BatchNorm = Statistics | Literal["recompute"]


class WeightInterpolation(Strategy):
    r"""Train as the other strategies say, then go part of the way back to the source.

    .. math:: w = (1 - t)\, w^0 + t\, w^1

    with w0 the weights from the source and w1 the same weights after training. Fresh parameters and integer buffers
    stay as trained. t has no scale to tune with the learning rate, the batch or the model: 0 is the source, 1 is no
    interpolation.

    Measured: docs/methods.md.

    Cost: none while training. With ``t=None``, ``points`` evaluations of the validation part, and a copy of the
    weights meanwhile.

    Hurts: where source and adapted weights are far apart, so that the line between them crosses a region of high
    loss.

    Reference:
        Wortsman et al. 2022, "Robust fine-tuning of zero-shot models", section 3.

    Example:
        >>> import torch, conservtl as ctl
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> adaptation = ctl.adapt(model, {"weight": torch.zeros(1, 2)}, [ctl.WeightInterpolation(t=0.5)])
        >>> with torch.no_grad():  # training
        ...     _ = model.weight.fill_(1.0)
        >>> adaptation.finish()
        {'weight_interpolation': {'t': 0.5}}
        >>> model.weight.tolist()
        [[0.5, 0.5]]
    """

    kind: Literal["weight_interpolation"] = "weight_interpolation"
    aliases: ClassVar[Aliases] = {"wise_ft": {}}
    t: Share | None = 0.7
    """Position between the source (0) and the trained weights (1). None: the best on the validation part; of several
    that differ by less than half an example, the middle one."""
    points: Points = 11
    """Number of values of t to try if none is given, evenly spaced from 0 to 1."""
    batch_norm: Literal["interpolate", "adapted", "source", "recompute"] = "interpolate"
    """Running means and variances. interpolate: as the weights. adapted, source: those after training, or the
    source's. recompute: computed again on the training data for every t except 0 and 1, which serves the target at
    the source's cost."""

    def apply(self, plan: Plan) -> Plan:
        """Add the interpolation after training."""
        if self.t is None:
            return plan.with_after(BestInterpolation(by=self.label, points=self.points, batch_norm=self.batch_norm))
        return plan.with_after(FixedInterpolation(by=self.label, t=self.t, batch_norm=self.batch_norm))


class FixedInterpolation(After):
    """Weights at a given point between their start and their trained values."""

    kind: Literal["weight_interpolation"] = "weight_interpolation"
    interpolates: ClassVar[bool] = True
    t: Share
    """0 is the start, 1 the trained weights."""
    batch_norm: BatchNorm = "interpolate"
    """Treatment of running means and variances."""

    def describe(self) -> str:
        """Return one line for the plan's table."""
        return f"weights at {self.t:g} of the way from the start to the trained weights (statistics: {self.batch_norm})"

    def finish(self, ending: FinishContext) -> dict[str, Any]:
        """Move the weights."""
        _path(ending, self.batch_norm, self.by).move(self.t)
        return {"t": self.t}


class BestInterpolation(After):
    """Weights at the point between their start and their trained values that is best on the validation part."""

    kind: Literal["best_weight_interpolation"] = "best_weight_interpolation"
    interpolates: ClassVar[bool] = True
    points: Points = 11
    """Number of points to try."""
    batch_norm: BatchNorm = "interpolate"
    """Treatment of running means and variances."""

    scored: ClassVar[bool] = True

    @property
    def name(self) -> str:
        """The name of ``FixedInterpolation``: a plan holds one of the two."""
        return "weight_interpolation"

    def describe(self) -> str:
        """Return one line for the plan's table."""
        return (
            f"weights at the best of {self.points} points from the start to the trained weights, by the validation "
            f"part (statistics: {self.batch_norm})"
        )

    def finish(self, ending: FinishContext) -> dict[str, Any]:
        """Score all points, and move to the best."""
        if ending.score is None:
            raise SpecError(f"{self.by} chooses on a validation part: pass score, or give fit valid={{...}}.")
        best, scores = _path(ending, self.batch_norm, self.by).choose(self.points, ending.score, ending.margin)
        return {"t": best, "scores": [{"t": t, "score": score} for t, score in scores.items()]}


def _path(ending: FinishContext, batch_norm: BatchNorm, by: str) -> WeightPath:
    """Return the line from the start to the trained weights."""
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
