"""Conservation of outputs: KLD-regularised adaptation and learning without forgetting (LwF)."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import model_validator

from conservtl.bounds import NonNegative, NonNegativeInt, Positive, Share
from conservtl.errors import SpecError
from conservtl.methods.base import Aliases, Span, Strategy, TestFields
from conservtl.methods.output_conservation.term import OutputConservationTerm
from conservtl.plan.plan import Plan
from conservtl.plan.term import OutputForm

__all__ = ["OutputConservation"]

_RHO = 0.1
_OUTPUTS = {"form": [None, "softmax", "sigmoid", "squared"], "class_axis": None, "blank": None}


class OutputConservation(Strategy):
    r"""Keep the model's outputs near the source model's on the adaptation data.

    With ``rho``, KLD-regularised adaptation: the labels are mixed with the source's outputs,

    .. math:: (1 - \rho) L + \rho T^2 \operatorname{CE}(p^0_T, p_T)

    With ``weight``, learning without forgetting: the task's loss keeps its full weight,

    .. math:: L + \lambda T^2 \operatorname{KL}(p^0_T \Vert p_T)

    p_T is the softmax of the logits over T, p^0_T that of the source model on the same inputs, under the same
    augmentation and autocast, in eval mode. Both are means over the batch, so neither strength depends on its size.

    ``form`` says what the outputs are: logits of classes (softmax), logits of labels that do not exclude each other or
    one logit (sigmoid), or numbers (squared: the mean of :math:`(o - o^0)^2` takes the place of CE and KL). By default
    it is what the task's loss takes them as. The sigmoid and squared forms are means over labels and numbers, like
    torch's losses.

    The classes are on the last axis of (N, classes) and (N, frames, classes), and on the second of (N, classes, H, W)
    and (N, classes, D, H, W), unless torch's cross-entropy takes them elsewhere or ``class_axis`` says so. The terms
    are means over all positions that count: no padding (as ``adaptation.loss`` finds it), no labels of -100.

    If the target has labels of its own, the outputs compared are those of the source's head on the adapted body. That
    head is frozen (LwF trains it too).

    Measured: docs/methods.md.

    Cost: a forward pass of the source a step, or one for each example in all if ``fit`` holds the data and nothing
    augments it; memory for the source model.

    Hurts: where the source is wrong on the target with confidence: its answers are what is conserved.

    Reference:
        Yu, Yao, Su, Li and Seide 2013, "KL-divergence regularized deep neural network adaptation for improved large
        vocabulary speech recognition", equations 4 to 6. Li and Hoiem 2016, "Learning without forgetting", equations
        1 to 4. T squared: Hinton, Vinyals and Dean 2015, section 2.

    Example:
        >>> import torch, conservtl as ctl
        >>> source, model = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)
        >>> adaptation = ctl.adapt(model, source, [ctl.OutputConservation(weight=1.0)])
        >>> x, labels = torch.randn(4, 2), torch.tensor([0, 1, 2, 0])
        >>> loss = torch.nn.functional.cross_entropy(model(x), labels)
        >>> bool(adaptation.loss(loss, model(x), x) == loss)  # the divergence is 0 at the source
        True
    """

    kind: Literal["output_conservation"] = "output_conservation"
    aliases: ClassVar[Aliases] = {"kld": {"rho": 0.1}, "lwf": {"weight": 0.05}}
    test_fields: ClassVar[TestFields] = (
        {"rho": [None, Span(0, 1)], "weight": None, "temperature": [None, Span(0.5, 4)], **_OUTPUTS},
        {"rho": None, "weight": Span(0, 2), "temperature": [None, Span(0.5, 4)], **_OUTPUTS},
    )
    form: OutputForm | None = None
    """softmax, sigmoid or squared. None: as the task's loss takes the outputs; a loss that does not say it is
    refused."""
    class_axis: int | None = None
    """Axis of the classes in the outputs. None: by the loss and the layout."""
    padding: Literal["leave_out", "count"] = "leave_out"
    """count: padding is compared too."""
    blank: NonNegativeInt | None = None
    """Output that is CTC's blank, 0 as a rule: frames at which the source answers it are left out, so that those with
    speech in them count. None: all frames count."""
    rho: Share | None = None
    """Share of the source's outputs in the targets, from 0 to 1. None: 0.1, unless ``weight`` is given. Choose a
    smaller one if the source is confident in its errors."""
    weight: NonNegative | None = None
    """lambda: factor on the divergence, beside the task's full loss."""
    temperature: Positive | None = None
    """T. None: 1 with ``rho``, 2 with ``weight``, as in the papers."""

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if self.rho is not None and self.weight is not None:
            raise ValueError("rho and weight are two forms of the same conservation: give one of them")
        return self

    def apply(self, plan: Plan) -> Plan:
        """Add the term.

        Raises:
            SpecError: the model has several outputs.
        """
        # With labels of the target's own, the outputs of the source's heads are compared, whatever the model returns.
        by_heads = any(plan[name].origin == "fresh" for name in plan.possible_head)
        if plan.outputs and not (by_heads and set(plan.outputs) <= set(plan.head_modules)):
            raise SpecError(
                f"{self.label}: the model must have one output to compare, or name its scores 'logits' or 'out'; it "
                f"has several, of {list(plan.outputs)}. Return one of them, or use FeatureConservation."
            )
        outputs = {"form": self.form, "class_axis": self.class_axis, "padding": self.padding, "blank": self.blank}
        if self.weight is not None:
            temperature = self.temperature or 2.0
            term = OutputConservationTerm(by=self.label, weight=self.weight, temperature=temperature, **outputs)
            return plan.with_term(term)
        rho = _RHO if self.rho is None else self.rho
        return plan.with_term(
            OutputConservationTerm(
                by=self.label,
                task=1 - rho,
                weight=rho,
                temperature=self.temperature or 1.0,
                divergence="cross_entropy",
                **outputs,
            )
        )
