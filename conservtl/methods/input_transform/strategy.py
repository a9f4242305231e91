"""Affine transform of the input, trained on the target: it maps the speaker's features to the source's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self

from pydantic import model_validator
from torch import nn

from conservtl.errors import PlanError
from conservtl.layers import Layer
from conservtl.methods._rows import freeze_all_but
from conservtl.methods.base import Order, Strategy, TestFields
from conservtl.methods.input_transform.affine import (
    NAME,
    add_transform,
    merge_transform,
    plain_transform,
    remove_transform,
)
from conservtl.plan.plan import Plan

__all__ = ["InputTransform"]

_REASON = "a transform of the input, which starts as the identity"


class InputTransform(Strategy):
    r"""Train an affine layer over the input's features, and little else.

    .. math:: x' = (I + D)\,x + b

    over one axis of the input, the same at every time and place. D = 0 and b = 0 at the start, so that the model's
    outputs do not change. The transform is a layer of its own, ``input_transform``, at the input side. Weight decay,
    the optimizer's or that of ``L2SP(beta=...)``, pulls D to zero and so the transform to the identity.

    ``merge`` (``adaptation.merged()``) multiplies the transform into the convolution or linear map that takes the
    input, exact to rounding, so that the adapted model costs nothing more. That needs an ``example``, which shows that
    one module alone takes the input; to merge b, that module must have a bias and not pad with zeros. Otherwise the
    transform stays.

    It needs a smaller learning rate than ``LHUC``.

    Measured: docs/methods.md.

    Cost: features squared numbers to train, and to store for each speaker; one product a step.

    Hurts: where the change is not a linear one of the features, or the learning rate is that of weights.

    Reference:
        Neto et al. 1995, "Speaker-adaptation for hybrid HMM-ANN continuous speech recognition system" (linear input
        network). Gemello et al. 2007, "Linear hidden transformations for adaptation of hybrid ANN/HMM models". Seide,
        Li, Chen and Yu 2011, "Feature engineering in context-dependent deep neural networks for conversational speech
        transcription" (feature-space discriminative linear regression).

    Example:
        >>> import torch, conservtl as ctl
        >>> source, model = (torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2)) for _ in range(2))
        >>> adaptation = ctl.adapt(model, source, [ctl.InputTransform(dim=-1)], example=torch.randn(5, 4))
        >>> adaptation.plan.trained
        ('input_transform.weight', 'input_transform.bias')
        >>> x = torch.randn(5, 4)
        >>> bool(torch.equal(model(x), source(x)))
        True
        >>> [name for name, _ in adaptation.merged().named_parameters()]
        ['0.weight', '0.bias', '1.weight', '1.bias']
    """

    kind: Literal["input_transform"] = "input_transform"
    order: ClassVar[Order] = Order.HEAD
    test_fields: ClassVar[TestFields] = ({"dim": [1, -1]},)
    dim: int | None = None
    """Axis of the features: 1 for (N, bands, frames) and (N, channels, height, width), -1 for (N, features) and
    (N, frames, features). None: -1 for an example with lengths, (N, frames, features), and 1 for others."""
    bias: bool = True
    """Whether the transform has a bias b."""
    freeze: bool = True
    """Whether everything is frozen except the transform and other fresh parameters."""

    @model_validator(mode="after")
    def _not_the_batch(self) -> Self:
        if self.dim == 0:
            raise ValueError("dim=0 is the batch: give the axis of the features, 1 or -1 say")
        return self

    def apply(self, plan: Plan) -> Plan:
        """Choose the parameters that are frozen."""
        if not any(row.added and row.layer == NAME for row in plan.rows):
            raise PlanError(f"{self.label}: the plan's model has no such transform. Let adapt(model, ...) add it.")
        return freeze_all_but(plan, self.label, plan.fresh) if self.freeze else plan

    def extend(self, model: nn.Module, layers: Sequence[Layer], example: Any) -> dict[str, str]:
        """Add the identity at the input."""
        return dict.fromkeys(add_transform(model, layers, example, self.dim, self.bias), _REASON)

    def retract(self, model: nn.Module) -> None:
        """Remove the transform."""
        remove_transform(model)

    def merge(self, model: nn.Module) -> bool:
        """Merge the transform into the weights that take the input."""
        return merge_transform(model)

    def plain(self, model: nn.Module) -> nn.Module:
        """Transform the input by a module of torch alone, if the transform is left."""
        return plain_transform(model)
