"""An affine transform of the input, learned from the target: the speaker's features made those of the source."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self

from pydantic import model_validator
from torch import nn

from conservtl.errors import PlanError
from conservtl.layers import Layer
from conservtl.methods.base import Order, Strategy, TestFields
from conservtl.methods.input_transform import affine
from conservtl.plan.plan import Plan

__all__ = ["InputTransform"]

_REASON = "a transform of the input, which starts as the identity"


class InputTransform(Strategy):
    r"""Put an affine layer over the input's features, and train little else.

    .. math:: x' = (I + D)\,x + b

    over one axis of the input, the same at every time and place, with D = 0 and b = 0 at the start, so that the model
    computes what it did. It is a layer of its own, ``input_transform``, at the input side. A weight decay, the
    optimizer's or ``L2SP(beta=...)``, pulls D to zero, and so the transform to the identity.

    ``merge`` (``adaptation.merged()``) multiplies it into the convolution or linear map that takes the input, exactly
    to rounding, so that the adapted model costs nothing: where an ``example`` showed which one takes it, and nothing
    else does; and with b only where that one has a bias and pads with no zeros. Otherwise it stays.

    With AdamW on spoken digits a rate of 3e-3 served; 1e-2 and 3e-2 cost the source much.

    Measured with its defaults against plain fine-tuning at 1e-4, in points of the harmonic mean of both domains, for a
    new speaker with one and five recordings a word and for corrupted images: -1.0 ± 1.0, -1.1 ± 0.9 and -13.1 ± 3.6
    (benchmarks/results/methods.md). So it loses to it: a few numbers to keep for each target are its gain, not
    accuracy, and an image has three channels to mix.

    Cost: features squared numbers to train and to keep for each speaker, and one product in each step.

    Reference:
        Neto et al. 1995, "Speaker-adaptation for hybrid HMM-ANN continuous speech recognition system" (linear input
        network). Gemello et al. 2007, "Linear hidden transformations for adaptation of hybrid ANN/HMM models". Seide,
        Li, Chen and Yu 2011, "Feature engineering in context-dependent deep neural networks for conversational speech
        transcription" (feature-space discriminative linear regression).
    """

    kind: Literal["input_transform"] = "input_transform"
    order: ClassVar[Order] = Order.HEAD
    test_fields: ClassVar[TestFields] = ({"dim": [1, -1]},)
    dim: int = 1
    """The axis of the features: 1 for (N, bands, frames) and (N, channels, height, width), -1 for (N, features) and
    (N, frames, features)."""
    bias: bool = True
    """Whether there is a b."""
    freeze: bool = True
    """Whether everything but the transform, and what else is fresh, is frozen."""

    @model_validator(mode="after")
    def _not_the_batch(self) -> Self:
        if self.dim == 0:
            raise ValueError("dim=0 is the batch: give the axis of the features, 1 or -1 say")
        return self

    @property
    def extends(self) -> bool:
        """It adds a transform."""
        return True

    def apply(self, plan: Plan) -> Plan:
        """Choose what is frozen."""
        if not any(row.added and row.layer == affine.NAME for row in plan.rows):
            raise PlanError(
                f"{self.label}: the plan's model has no such transform. Let adapt(model, ...) put it there."
            )
        if not self.freeze:
            return plan
        rows = [row for row in plan.rows if "frozen" in row.chosen or not row.frozen]  # what has no gradient stays
        frozen = {row.name: {"frozen": row.origin == "source"} for row in rows}
        return plan.choose(self.label, "frozen", frozen, explicit=False)

    def extend(self, model: nn.Module, layers: Sequence[Layer], example: Any) -> dict[str, str]:
        """Put the identity in front."""
        return dict.fromkeys(affine.extend(model, layers, example, self.dim, self.bias), _REASON)

    def retract(self, model: nn.Module) -> None:
        """Take it away."""
        affine.retract(model)

    def merge(self, model: nn.Module) -> bool:
        """Multiply it into the weights that take the input."""
        return affine.merge(model)
