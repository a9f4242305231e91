"""Conservation of features: DELTA and LDIFS."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from conservtl.errors import SpecError
from conservtl.layers import select
from conservtl.methods.base import Aliases, Span, Strategy, TestFields
from conservtl.methods.feature_conservation.attention import AttentionMeasure
from conservtl.methods.feature_conservation.distance import FeatureConservationTerm
from conservtl.plan.plan import Plan
from conservtl.runtime.channels import channels_first

__all__ = ["FeatureConservation"]

_ALPHA = {"delta": 0.01, "ldifs": 0.3}


class FeatureConservation(Strategy):
    r"""Keep what layers inside the model compute near what they computed in the source, on the adaptation data.

    ``metric="delta"`` compares feature maps as they are, channel by channel,

    .. math:: \frac{\alpha}{2} \sum_l \frac{1}{h_l w_l} \sum_c W_{lc} \lVert FM_{lc} - FM^0_{lc} \rVert_2^2

    with W = 1, or with ``attention`` W = C softmax(rise of the task's loss when channel c of the source's features is
    zeroed), the mean over C channels being 1 so that alpha means the same with it and without. ``metric="ldifs"``
    compares them after each position's vector z of features is divided by its length,

    .. math:: \alpha \sum_l \frac{1}{h_l w_l} \sum_{p} \lVert \hat z_{lp} - \hat z^0_{lp} \rVert_2^2

    Sums over layers and channels, means over positions and over the batch: alpha depends on the number of layers
    tapped, for DELTA on the scale of their features and the number of channels, and never on the batch size. The source
    sees the same inputs, in eval mode, without gradient: batch norms that go by the batch's statistics make features
    differ before a weight has moved, so hold them (``model.eval()``, or ``batch_norm="eval"`` in ``Training``). Layers
    below which nothing is trained add nothing.

    Channels stand second in the outputs of convolutions, (N, C, ...), and last in all others, (N, frames, C).

    Attention is measured once, with the model at its start: where its head is fresh, the loss knows nothing yet of what
    matters, and ``attention`` had better be off.

    Measured with its defaults against plain fine-tuning at 1e-4, in points of the harmonic mean of both domains, for a
    new speaker with one and five recordings a word and for corrupted images: ``delta`` with attention +0.4 ± 0.6, +0.6
    ± 0.3 and +1.9 ± 0.8; ``ldifs`` +0.6 ± 0.5, +0.7 ± 0.3 and +0.8 ± 0.9 (benchmarks/results/methods.md).

    Cost: a forward pass of the source a step, or one for each example in all where ``fit`` holds the data and nothing
    augments it; memory for the source model and a copy of the tapped features. Attention: before training, one forward
    pass of what lies behind each tapped layer for each of its channels, many channels to a pass.

    Reference:
        Li et al. 2019, "DELTA: Deep learning transfer using feature map with attention for convolutional networks",
        sections 3.2 and 3.3; the factor C on W is that of the authors' code. Mukhoti et al. 2023, "Fine-tuning can
        cripple your foundation model; preserving features may be the solution" (LDIFS).
    """

    kind: Literal["feature_conservation"] = "feature_conservation"
    aliases: ClassVar[Aliases] = {"delta": {"attention": True}, "ldifs": {"metric": "ldifs"}}
    test_fields: ClassVar[TestFields] = (
        {"metric": "delta", "alpha": [None, Span(0.1, 1)]},
        {"metric": "ldifs", "alpha": [None, Span(0.1, 1)], "attention": False},
    )
    alpha: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """Strength. None: 0.01 for delta, 0.3 for ldifs."""
    metric: Literal["delta", "ldifs"] = "delta"
    """delta: feature maps as they are. ldifs: features divided by their length over channels."""
    attention: bool = False
    """Whether channels are weighed by how much the task needs them (delta only)."""
    layers: Annotated[int, Field(ge=1, strict=True)] | tuple[str, ...] = 4
    """How many layers to tap, evenly over the depth and the last before the head among them, or all there are where
    they are fewer; or names and globs of layers."""

    @model_validator(mode="after")
    def _weighable(self) -> Self:
        if self.attention and self.metric == "ldifs":
            raise ValueError("attention weighs the channels of feature maps: it needs metric='delta'")
        if self.layers == ():
            raise ValueError("layers must name at least one layer to tap")
        return self

    def apply(self, plan: Plan) -> Plan:
        """Add the term, and ask for the attention it needs."""
        taps = self._taps(plan)
        first = {layer: channels_first(rows) for layer, rows in plan.by_layer() if layer in taps}
        if self.attention:
            plan = plan.with_measure(AttentionMeasure(by=self.label, layers=taps, first=first))
        return plan.with_term(
            FeatureConservationTerm(
                by=self.label,
                taps=taps,
                alpha=_ALPHA[self.metric] if self.alpha is None else self.alpha,
                metric=self.metric,
                reads=("attention",) if self.attention else (),
                first=first,
            )
        )

    def _taps(self, plan: Plan) -> tuple[str, ...]:
        if isinstance(self.layers, tuple):
            found = select(self.layers, plan.layers, "layer")
            chosen = {name for names in found.values() for name in names}
            return tuple(layer for layer in plan.layers if layer in chosen)
        body = plan.own_layers[:-1]
        if not body:
            raise SpecError(
                f"{self.label}: the model is one layer, {plan.layers[0]!r}, so there are no features before a head to "
                "keep. Use OutputConservation."
            )
        count = min(self.layers, len(body))
        return tuple(body[(number + 1) * len(body) // count - 1] for number in range(count))
