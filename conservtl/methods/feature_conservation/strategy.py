"""Conservation of features: DELTA and LDIFS."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from conservtl.bounds import NonNegative
from conservtl.errors import SpecError
from conservtl.methods.base import Aliases, Span, Strategy, TestFields
from conservtl.methods.feature_conservation.attention import AttentionMeasure
from conservtl.methods.feature_conservation.distance import FeatureConservationTerm
from conservtl.plan.plan import Plan

__all__ = ["FeatureConservation"]

_ALPHA = {"delta": 0.01, "ldifs": 0.3}


class FeatureConservation(Strategy):
    r"""Keep the features of layers inside the model near those of the source model, on the adaptation data.

    ``metric="delta"`` compares feature maps as they are, channel by channel,

    .. math:: \frac{\alpha}{2} \sum_l \frac{1}{h_l w_l} \sum_c W_{lc} \lVert FM_{lc} - FM^0_{lc} \rVert_2^2

    with W = 1, or with ``attention`` W = C softmax(rise of the task's loss if channel c of the source's features is
    zeroed). The mean of W over the C channels is 1, so alpha means the same with and without attention.
    ``metric="ldifs"`` compares feature vectors z of each position, divided by their length,

    .. math:: \alpha \sum_l \frac{1}{h_l w_l} \sum_{p} \lVert \hat z_{lp} - \hat z^0_{lp} \rVert_2^2

    Both are sums over layers and channels, means over positions and over the batch. So alpha depends on the number of
    tapped layers and, for DELTA, on the scale of their features and on the number of channels, but not on the batch
    size. The source sees the same inputs in eval mode, without gradient. Batch norms that use the statistics of the
    batch change features before a weight has moved, so hold them: ``model.eval()``, or ``batch_norm="eval"`` in
    ``Training``. Layers below which nothing is trained add nothing.

    Padding is left out, as ``adaptation.loss`` finds it: means are over the positions that count, and where a layer has
    other positions than the inputs, they follow the strides of the convolutions and poolings before it.

    The axis of the channels, second in (N, C, ...) and last in (N, frames, C) or (N, H, W, C), is found from the sizes
    that a layer's modules declare (``runtime.layer_features``). A layer that does not run in a step (layerdrop,
    stochastic depth) is left out of that step's sum. If a layer runs more than once in a forward pass (Siamese and
    shared layers) or returns several tensors, the mean of their distances is taken.

    Attention is measured once, on the model at its start. A fresh head cannot yet tell which channels matter: leave
    ``attention`` off then.

    Measured: docs/methods.md.

    Cost: a forward pass of the source a step, or one for each example in all if ``fit`` holds the data and nothing
    augments it; memory for the source model and both models' tapped features. Attention: before training, one forward
    pass behind each tapped layer for each of its channels, many channels to a pass.

    Hurts: where the target's features must differ from the source's, or memory for the source model is short.

    Reference:
        Li et al. 2019, "DELTA: Deep learning transfer using feature map with attention for convolutional networks",
        sections 3.2 and 3.3; the factor C on W is that of the authors' code. Mukhoti et al. 2023, "Fine-tuning can
        cripple your foundation model; preserving features may be the solution" (LDIFS).

    Example:
        >>> import torch, conservtl as ctl
        >>> source, model = (torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)) for _ in range(2))
        >>> adaptation = ctl.adapt(model, source, [ctl.FeatureConservation(alpha=0.1)])
        >>> with torch.no_grad():
        ...     _ = model[0].bias.add_(torch.tensor([2.0, 0.0]))  # one of the features moves by 2
        >>> x = torch.randn(5, 2)
        >>> outputs = model(x)
        >>> round(adaptation.loss(0 * outputs.sum(), outputs, x).item(), 3)  # 0.1 / 2 × 2²
        0.2
    """

    kind: Literal["feature_conservation"] = "feature_conservation"
    aliases: ClassVar[Aliases] = {"delta": {"attention": True}, "ldifs": {"metric": "ldifs"}}
    test_fields: ClassVar[TestFields] = (
        {"metric": "delta", "alpha": [None, Span(0.1, 1)]},
        {"metric": "ldifs", "alpha": [None, Span(0.1, 1)], "attention": False},
    )
    alpha: NonNegative | None = None
    """Strength. None: 0.01 for delta, 0.3 for ldifs."""
    metric: Literal["delta", "ldifs"] = "delta"
    """delta: feature maps as they are. ldifs: feature vectors divided by their length over channels."""
    attention: bool = False
    """Whether channels are weighted by the rise of the task's loss without them (delta only)."""
    layers: Annotated[int, Field(ge=1, strict=True)] | tuple[str, ...] = 4
    """Layers to tap: their number, spaced evenly over the depth up to the last that holds no head (all of these if
    there are fewer); or names and globs of layers."""
    padding: Literal["leave_out", "count"] = "leave_out"
    """count: padding is compared too."""

    @model_validator(mode="after")
    def _weighable(self) -> Self:
        if self.attention and self.metric == "ldifs":
            raise ValueError("attention weighs the channels of feature maps: it needs metric='delta'")
        if self.layers == ():
            raise ValueError("layers must name at least one layer to tap")
        return self

    def apply(self, plan: Plan) -> Plan:
        """Add the term, and the measurement of its attention."""
        taps = self._taps(plan)
        if self.attention:
            plan = plan.with_measure(AttentionMeasure(by=self.label, layers=taps))
        return plan.with_term(
            FeatureConservationTerm(
                by=self.label,
                taps=taps,
                alpha=_ALPHA[self.metric] if self.alpha is None else self.alpha,
                metric=self.metric,
                reads=("attention",) if self.attention else (),
                padding=self.padding,
            )
        )

    def _taps(self, plan: Plan) -> tuple[str, ...]:
        """Return the layers to tap, input side first."""
        if isinstance(self.layers, tuple):
            matched = plan.select_layers(self.layers).values()
            chosen = {name for names in matched for name in names}
            return tuple(layer for layer in plan.layers if layer in chosen)
        heads = {plan[name].layer for name in plan.possible_head}
        heads |= {row.layer for row in plan.rows if row.source_shape not in (None, row.shape)}
        body = [layer for layer in plan.own_layers if layer not in heads]
        if not body:
            raise SpecError(
                f"{self.label}: the model is one layer, {plan.layers[0]!r}, so there are no features before a head to "
                "keep. Use OutputConservation."
            )
        count = min(self.layers, len(body))
        return tuple(body[(number + 1) * len(body) // count - 1] for number in range(count))
