"""Feature extraction: the source model as it is, a new head on top."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator
from torch import nn

from conservtl.errors import SpecError
from conservtl.layers import Layer
from conservtl.methods.base import Order, Strategy, TestFields
from conservtl.methods.feature_extraction import probe_head
from conservtl.methods.feature_extraction.fitted_head import FittedHead
from conservtl.plan.plan import Plan

__all__ = ["FeatureExtraction"]

_C = {"svm": 0.03, "logistic": 0.1}


class FeatureExtraction(Strategy):
    r"""Freeze everything and put a new head on it: trained, or fitted to the features.

    The head is the classifier: fresh already where its labels or its shape differ, and made fresh
    where it would fit. Whatever else is fresh is trained with it; the norm before it stays the
    source's.

    ``classifier="linear"`` trains it by gradient. The frozen body's features are computed once and reused by ``fit``
    where nothing random stands before them (no augmentation, no active dropout) and they come from the last layer.

    The others are fitted once training is over (there is none, unless other layers are fresh) to the features x of the
    training data, computed once, in eval mode and without augmentation, and kept in memory, beyond 2 GiB in a mapped
    file. They are linear, s = W x + b, and written into the head, so that the model's weights are all that is saved.

    .. math:: \text{svm:}\quad \min \tfrac{1}{2}|w_c|^2 + C \sum_i \max(0, 1 - y_{ic} s_{ic})^2
              \quad\text{for each class } c \text{ against the rest}, y = \pm 1

    .. math:: \text{logistic:}\quad \min \tfrac{1}{2}|W|^2 - C \sum_i \log \text{softmax}(s_i)_{y_i}

    .. math:: \text{ncm:}\quad s_c = 2\, m_c \cdot x - |m_c|^2, \quad m_c \text{ the mean of class } c:
              \text{ the nearest has the largest score}

    The first two on features of mean 0 and variance 1 over the training data, which W and b take in. C stands on a sum
    over examples: more of them weaken the regularisation. Only the logistic scores are meant as probabilities.

    With ``layers`` the features are the outputs of those, means over positions, side by side. The new head takes the
    place of the model's, under its name, and is fed from them; how many they are is seen by running ``example``.

    Cost: one forward pass for each example; scikit-learn works on a copy in double precision (svm).

    Reference:
        Donahue et al. 2014, "DeCAF"; Sharif Razavian et al. 2014, "CNN features off-the-shelf". Mensink et al. 2013,
        "Distance-based image classification: Generalizing to new classes at near-zero cost" (nearest class mean).
    """

    kind: Literal["feature_extraction"] = "feature_extraction"
    order: ClassVar[Order] = Order.HEAD
    replaces_head: ClassVar[bool] = True
    test_fields: ClassVar[TestFields] = ({"C": None},)
    classifier: Literal["linear", "svm", "logistic", "ncm"] = "linear"
    """linear: trained by gradient. svm: a linear SVM, logistic: multinomial logistic regression, ncm: nearest class
    mean, fitted to the features (svm and logistic by scikit-learn)."""
    C: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Strength of the loss against the regularisation of svm and logistic. None: 0.03 for svm, 0.1 for logistic."""
    layers: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Names or globs of the layers whose outputs are the features; the last stands for what enters the head. None: that
    alone."""

    @model_validator(mode="after")
    def _regularised(self) -> Self:
        if self.C is not None and self.classifier not in _C:
            raise ValueError(f"C belongs to svm and logistic: leave it out with classifier={self.classifier!r}")
        return self

    @property
    def extends(self) -> bool:
        """Whether it puts another head on the model."""
        return self.layers is not None

    def apply(self, plan: Plan) -> Plan:
        """Freeze the body; the head is fresh, and trained or fitted."""
        head = plan.head
        made = [name for name in head if name not in plan.fresh]
        fresh = {"origin": "fresh", "reason": f"declared fresh by {self.label}"}
        plan = plan.choose(self.label, "origin", dict.fromkeys(made, fresh))
        body = {row.name: {"frozen": True} for row in plan.rows if row.origin == "source"}
        plan = plan.choose(self.label, "frozen", body, explicit=False)
        learns = [row.name for row in plan.rows if row.name not in head and (row.origin == "fresh" or not row.frozen)]
        # What else is to learn needs a head to learn under; a fitted one comes when that is done.
        fitted = self.classifier != "linear"
        frozen = {name: {"frozen": fitted and not learns} for name in plan.fresh}
        plan = plan.choose(self.label, "frozen", frozen)
        return plan.with_after(self._fitted(plan)) if fitted else plan

    def _fitted(self, plan: Plan) -> FittedHead:
        name, shapes = plan.head_module, {name: plan[name].shape for name in plan.head}
        join = f"{name}." if name else ""
        weight, bias = (shapes.get(f"{join}{key}", ()) for key in ("weight", "bias"))
        if len(shapes) != 2 or len(weight) < 2 or bias != weight[:1] or any(size > 1 for size in weight[2:]):
            raise SpecError(
                f"{self.label}: classifier={self.classifier!r} is written into the head, which must be a linear map "
                f"(or a convolution of size 1) with a weight and a bias; {name!r} has {shapes}. Name its layer "
                "in layers, so that a head with both takes its place; or use classifier='linear'."
            )
        strength = _C.get(self.classifier) if self.C is None else self.C
        return FittedHead(by=self.label, classifier=self.classifier, C=strength, head=name)

    def extend(self, model: nn.Module, layers: Sequence[Layer], example: Any) -> dict[str, str]:
        """Put a head in the model's place that is fed from the layers; it adds nothing by another name."""
        probe_head.extend(model, layers, example, self.layers or ())
        return {}

    def retract(self, model: nn.Module) -> None:
        """Put the model's own head back."""
        if self.extends:
            probe_head.retract(model)
