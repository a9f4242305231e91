"""Conservation of outputs: KLD-regularised adaptation and learning without forgetting (LwF)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import model_validator
from torch import Tensor

from conservtl.bounds import NonNegative, Positive, Share
from conservtl.errors import SpecError
from conservtl.functions import logits_of
from conservtl.methods.base import Aliases, Span, Strategy, TestFields
from conservtl.plan.plan import Plan
from conservtl.plan.term import Term, View

__all__ = ["OutputConservation", "OutputConservationTerm", "cross_entropy_to_source", "kl_to_source"]

_RHO = 0.1


class OutputConservation(Strategy):
    r"""Keep the model's outputs near the source model's on the adaptation data.

    With ``rho``, KLD-regularised adaptation: the labels are mixed with the source's outputs,

    .. math:: (1 - \rho) L + \rho T^2 \operatorname{CE}(p^0_T, p_T)

    With ``weight``, learning without forgetting: the task's loss keeps its full weight,

    .. math:: L + \lambda T^2 \operatorname{KL}(p^0_T \Vert p_T)

    p_T is the softmax of the logits over T, p^0_T that of the source model on the same inputs, under the same
    augmentation and autocast, in eval mode. Both are means over the batch, so neither strength depends on its size.
    For outputs (N, frames, classes) they are means over frames; padding is left out if the model returns
    (logits, lengths).

    If the target has labels of its own, the outputs compared are those of the source's head on the adapted body. That
    head is frozen (LwF trains it too).

    Measured: docs/methods.md.

    Cost: a forward pass of the source a step, or one for each example in all if ``fit`` holds the data and nothing
    augments it; memory for the source model.

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
        {"rho": [None, Span(0, 1)], "weight": None, "temperature": [None, Span(0.5, 4)]},
        {"rho": None, "weight": Span(0, 2), "temperature": [None, Span(0.5, 4)]},
    )
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
        """Add the term."""
        if self.weight is not None:
            return plan.with_term(
                OutputConservationTerm(by=self.label, weight=self.weight, temperature=self.temperature or 2.0)
            )
        rho = _RHO if self.rho is None else self.rho
        return plan.with_term(
            OutputConservationTerm(
                by=self.label,
                task=1 - rho,
                weight=rho,
                temperature=self.temperature or 1.0,
                divergence="cross_entropy",
            )
        )


class OutputConservationTerm(Term):
    """Cross-entropy or KL divergence to the source's outputs."""

    kind: Literal["outputs"] = "outputs"
    weight: NonNegative
    """Factor, beside the squared temperature."""
    temperature: Positive = 1.0
    """Divides the logits of both models."""
    divergence: Literal["cross_entropy", "kl"] = "kl"
    """The two differ by the entropy of the source's outputs, which has no gradient."""

    heads: ClassVar[bool] = True

    def describe(self) -> str:
        """One line for the plan's table."""
        task = f"{self.task:g} × task + " if self.task < 1 else ""
        name = "KL divergence" if self.divergence == "kl" else "cross-entropy"
        return f"{task}{self.weight:g} × {name} to the source's outputs at temperature {self.temperature:g}"

    def value(self, adapted: View, source: View | None, measured: Mapping[str, Any]) -> Tensor:  # noqa: ARG002
        """Return the term."""
        logits, mask = _logits_and_mask(adapted.outputs)
        target, _ = _logits_and_mask(source.outputs if source is not None else None)
        if logits.shape != target.shape:
            raise SpecError(
                f"{self.by}: the adapted model gives outputs of shape {tuple(logits.shape)}, the source "
                f"{tuple(target.shape)}. They must be of the same classes, in the same order; declare a head for other "
                "labels: fresh=['head']."
            )
        function = kl_to_source if self.divergence == "kl" else cross_entropy_to_source
        return self.weight * function(logits, target, self.temperature, mask)


def cross_entropy_to_source(
    logits: Tensor, source: Tensor, temperature: float = 1.0, mask: Tensor | None = None
) -> Tensor:
    """Return T² × cross-entropy of softmax(logits / T) against softmax(source / T), the mean over examples or frames.

    The factor T² keeps its gradient at the scale of the task's (Hinton et al. 2015, section 2).

    Args:
        logits: (N, classes) or (N, frames, classes) of the adapted model.
        source: logits of the source model, the same shape; no gradient reaches them.
        temperature: T.
        mask: (N, frames), false for padding. None: no padding.
    """
    target = (source.detach().float() / temperature).softmax(-1)
    return temperature**2 * _mean(-(target * (logits.float() / temperature).log_softmax(-1)).sum(-1), mask)


def kl_to_source(logits: Tensor, source: Tensor, temperature: float = 1.0, mask: Tensor | None = None) -> Tensor:
    """Return T² × KL(softmax(source / T) || softmax(logits / T)); arguments as for ``cross_entropy_to_source``."""
    target = (source.detach().float() / temperature).log_softmax(-1)
    adapted = (logits.float() / temperature).log_softmax(-1)
    return temperature**2 * _mean((target.exp() * (target - adapted)).sum(-1), mask)


def _mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean over the mask; values outside it may be anything, NaN included."""
    if mask is None:
        return values.mean()
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)


def _logits_and_mask(outputs: Any) -> tuple[Tensor, Tensor | None]:
    """Return logits, and a mask of the frames that are no padding if the outputs are or have logits and lengths."""
    if isinstance(outputs, (tuple, list)):
        logits, lengths = outputs[0], outputs[1] if len(outputs) > 1 else None
    else:
        logits = logits_of(outputs)
        lengths = outputs.get("lengths") if isinstance(outputs, Mapping) else getattr(outputs, "lengths", None)
    if not isinstance(logits, Tensor):
        raise SpecError(f"outputs must be logits, (logits, lengths) or have .logits; received {type(logits).__name__}.")
    if not isinstance(lengths, Tensor) or logits.ndim != 3:
        return logits, None
    frames = torch.arange(logits.shape[1], device=logits.device)
    return logits, frames < lengths.to(logits.device)[:, None]
