"""Feature extraction: a new head on the frozen source model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator
from torch import nn

from conservtl.bounds import Positive
from conservtl.errors import SpecError
from conservtl.layers import Layer
from conservtl.methods.base import Order, Strategy, TestFields
from conservtl.methods.feature_extraction.fitted_head import FittedHead
from conservtl.methods.feature_extraction.plain_probe import plain_probe
from conservtl.methods.feature_extraction.probe_head import add_probe_head, refuse_tied, remove_probe_head
from conservtl.plan.plan import Plan

__all__ = ["FeatureExtraction"]

_C = {"svm": 0.03, "logistic": 0.1}


class FeatureExtraction(Strategy):
    r"""Freeze everything and put a new head on it, trained by gradient or fitted to the features.

    The head is the classifier. It is fresh already if its labels or its shape differ, and is made fresh if not; it is
    trained even if it was frozen when the model was handed in. Other fresh parameters are trained with it; the norm
    before it stays the source's.

    ``classifier="linear"`` trains the head by gradient. ``fit`` computes the frozen body's features once and reuses
    them if nothing random acts before them (augmentation, dropout) and they come from the last layer.

    The other classifiers are fitted after training (there is none, unless other parameters are fresh) to the features
    x of the training data. These are computed once, in eval mode and without augmentation, and kept in memory, above
    2 GiB in a mapped file. The classifiers are linear, s = W x + b, and written into the head, so that the model's
    weights hold everything.

    .. math:: \text{svm:}\quad \min \tfrac{1}{2}|w_c|^2 + C \sum_i \max(0, 1 - y_{ic} s_{ic})^2
              \quad\text{for each class } c \text{ against the rest}, y = \pm 1

    .. math:: \text{logistic:}\quad \min \tfrac{1}{2}|W|^2 - C \sum_i \log \text{softmax}(s_i)_{y_i}

    .. math:: \text{ncm:}\quad s_c = 2\, m_c \cdot x - |m_c|^2, \quad m_c \text{ the mean of class } c:
              \text{ the nearest has the largest score}

    The first two are fitted to features scaled to mean 0 and variance 1 over the training data; W and b include the
    scaling. C multiplies a sum over examples, so more examples weaken the regularisation. Only the logistic scores are
    meant as probabilities.

    With ``layers`` the features are the outputs of these layers, as means over positions, concatenated. The new head
    replaces the model's under the same name. Running ``example`` shows the number of features.

    Cost: one forward pass for each example; for svm, scikit-learn works on a copy in double precision.

    Hurts: where the frozen features do not separate the target's labels.

    Reference:
        Donahue et al. 2014, "DeCAF"; Sharif Razavian et al. 2014, "CNN features off-the-shelf". Mensink et al. 2013,
        "Distance-based image classification: Generalizing to new classes at near-zero cost" (nearest class mean).

    Example:
        >>> import torch, conservtl as ctl
        >>> source, model = (torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)) for _ in range(2))
        >>> plan = ctl.adapt(model, source, [ctl.FeatureExtraction()]).plan
        >>> [(row.name, row.origin, row.frozen) for row in plan.rows if row.kind == "weight"]
        [('0.weight', 'source', True), ('1.weight', 'fresh', False)]
    """

    kind: Literal["feature_extraction"] = "feature_extraction"
    order: ClassVar[Order] = Order.HEAD
    replaces_head: ClassVar[bool] = True
    test_fields: ClassVar[TestFields] = ({"C": None},)
    classifier: Literal["linear", "svm", "logistic", "ncm"] = "linear"
    """linear: trained by gradient. Fitted to the features (svm and logistic by scikit-learn): svm, a linear SVM;
    logistic, multinomial logistic regression; ncm, nearest class mean."""
    C: Positive | None = None
    """Weight of the loss relative to the regularisation, for svm and logistic. None: 0.03 for svm, 0.1 for logistic."""
    layers: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Names or globs of the layers whose outputs are the features; the last layer means the head's input. None: the
    head's input alone."""

    @model_validator(mode="after")
    def _regularised(self) -> Self:
        if self.C is not None and self.classifier not in _C:
            raise ValueError(f"C belongs to svm and logistic: leave it out with classifier={self.classifier!r}")
        return self

    @property
    def extends(self) -> bool:
        """Whether the head is replaced by one that is fed from layers."""
        return self.layers is not None

    def apply(self, plan: Plan) -> Plan:
        """Freeze the body, and make the head fresh: trained or fitted."""
        refuse_tied(plan, self.label)
        head = plan.head
        copied = [name for name in head if plan[name].origin == "source"]
        fresh = {"origin": "fresh", "reason": f"declared fresh by {self.label}"}
        plan = plan.choose(self.label, "origin", dict.fromkeys(copied, fresh))
        body = [row.name for row in plan.rows if row.origin == "source" or row.name in plan.factors]
        plan = plan.choose(self.label, "frozen", {name: {"frozen": True} for name in body}, explicit=False)
        others = [
            row.name
            for row in plan.rows
            if row.name not in head and not row.as_found and (row.origin == "fresh" or not row.frozen)
        ]
        # Other trained parameters need a head to be trained under; a fitted head replaces it afterwards.
        fitted = self.classifier != "linear"
        new = [name for name in plan.fresh if name in head or not plan[name].as_found]
        frozen = {name: {"frozen": fitted and not others} for name in new}
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
        """Replace the head by one that is fed from the layers, with parameters of the same names."""
        add_probe_head(model, layers, example, self.layers or ())
        return {}

    def retract(self, model: nn.Module) -> None:
        """Restore the model's own head."""
        if self.extends:
            remove_probe_head(model)

    def plain(self, model: nn.Module) -> nn.Module:
        """Feed the head without hooks, if it is fed from layers."""
        return plain_probe(model)
