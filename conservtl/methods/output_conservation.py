"""Conservation of outputs: KLD-regularised adaptation, learning without forgetting."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from conservtl.errors import SpecError
from conservtl.functions import logits_of
from conservtl.methods.base import Aliases, Span, Strategy, TestFields
from conservtl.plan.decision import Term, View
from conservtl.plan.plan import Plan

__all__ = ["OutputConservation", "OutputConservationTerm", "cross_entropy_to_source", "kl_to_source"]


class OutputConservationTerm(Term):
    """Cross-entropy or KL divergence to the source's outputs."""

    kind: Literal["outputs"] = "outputs"
    weight: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    """Factor on it, beside the squared temperature."""
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Divides the logits of both."""
    divergence: Literal["cross_entropy", "kl"] = "kl"
    """They differ by the entropy of the source's outputs, which has no gradient."""

    heads: ClassVar[bool] = True

    def describe(self) -> str:
        """One line for the plan's table."""
        own = f"{self.task:g} × task + " if self.task < 1 else ""
        name = "KL divergence" if self.divergence == "kl" else "cross-entropy"
        return f"{own}{self.weight:g} × {name} to the source's outputs at temperature {self.temperature:g}"

    def value(self, adapted: View, source: View | None, measured: Mapping[str, Any]) -> Tensor:  # noqa: ARG002
        """The term."""
        logits, mask = _frames(adapted.outputs)
        theirs, _ = _frames(source.outputs if source is not None else None)
        if logits.shape != theirs.shape:
            raise SpecError(
                f"{self.by}: the adapted model gives outputs of shape {tuple(logits.shape)}, the source "
                f"{tuple(theirs.shape)}. They must be of the same classes, in the same order; declare a head for other "
                "labels: fresh=['head']."
            )
        function = kl_to_source if self.divergence == "kl" else cross_entropy_to_source
        return self.weight * function(logits, theirs, self.temperature, mask)


def cross_entropy_to_source(
    logits: Tensor, source: Tensor, temperature: float = 1.0, mask: Tensor | None = None
) -> Tensor:
    """T² × cross-entropy of softmax(logits / T) against softmax(source / T), mean over examples, or frames in the mask.

    The factor T² keeps its gradient of the size of the task's own (Hinton et al. 2015, section 2).

    Args:
        logits: (N, classes) or (N, frames, classes) of the adapted model.
        source: of the source model, the same shape; no gradient reaches it.
        temperature: T.
        mask: (N, frames), true where there is something; None everywhere.
    """
    target = (source.detach().float() / temperature).softmax(-1)
    return temperature**2 * _mean(-(target * (logits.float() / temperature).log_softmax(-1)).sum(-1), mask)


def kl_to_source(logits: Tensor, source: Tensor, temperature: float = 1.0, mask: Tensor | None = None) -> Tensor:
    """T² × KL(softmax(source / T) || softmax(logits / T)); arguments as ``cross_entropy_to_source``."""
    theirs = (source.detach().float() / temperature).log_softmax(-1)
    ours = (logits.float() / temperature).log_softmax(-1)
    return temperature**2 * _mean((theirs.exp() * (theirs - ours)).sum(-1), mask)


def _mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over what is in the mask; what is not may be anything, NaN included."""
    if mask is None:
        return values.mean()
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)


def _frames(outputs: Any) -> tuple[Tensor, Tensor | None]:
    """Logits, and which frames are no padding where the model gives (logits, lengths), or ``lengths`` beside them."""
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


_RHO = 0.1


class OutputConservation(Strategy):
    r"""Keep the model's outputs near the source model's on the adaptation data.

    With ``rho``, KLD-regularised adaptation: the labels are mixed with the source's outputs,

    .. math:: (1 - \rho) L + \rho T^2 \operatorname{CE}(p^0_T, p_T)

    with ``weight``, learning without forgetting: the task's loss keeps its full weight,

    .. math:: L + \lambda T^2 \operatorname{KL}(p^0_T \Vert p_T)

    where p_T is the softmax of the logits over T, of the adapted and of the source model on the same inputs, under the
    same augmentation and autocast, the source in eval mode. Means over the batch, so neither depends on its size; for
    outputs (N, frames, classes), means over the frames that are no padding, where the model gives (logits, lengths).

    Where the target has labels of its own, the outputs compared are those of the source's own head, which is kept as it
    was on top of the adapted body (LwF trains it on; here it stands still).

    Measured with its defaults against plain fine-tuning at 1e-4, in points of the harmonic mean of both domains, for a
    new speaker with one and five recordings a word and for corrupted images: ``rho`` +0.4 ± 0.5, +0.5 ± 0.4 and +0.7 ±
    0.6; ``weight=0.05`` +0.5 ± 0.4, +0.5 ± 0.3 and +1.1 ± 0.6 (benchmarks/results/methods.md).

    Cost: a forward pass of the source a step, or one for each example in all where ``fit`` holds the data and nothing
    augments it; memory for the source model.

    Reference:
        Yu, Yao, Su, Li and Seide 2013, "KL-divergence regularized deep neural network adaptation for improved large
        vocabulary speech recognition", equations 4 to 6. Li and Hoiem 2016, "Learning without forgetting", equations
        1 to 4. T squared: Hinton, Vinyals and Dean 2015, section 2.
    """

    kind: Literal["output_conservation"] = "output_conservation"
    aliases: ClassVar[Aliases] = {"kld": {"rho": 0.1}, "lwf": {"weight": 0.05}}
    test_fields: ClassVar[TestFields] = (
        {"rho": [None, Span(0, 1)], "weight": None, "temperature": [None, Span(0.5, 4)]},
        {"rho": None, "weight": Span(0, 2), "temperature": [None, Span(0.5, 4)]},
    )
    rho: Annotated[float, Field(ge=0, le=1)] | None = None
    """Share of the source's outputs in the targets, 0 to 1. None: 0.1, or ``weight`` is used instead. The surer the
    source is of what it gets wrong, the smaller it should be."""
    weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """lambda: factor on the divergence beside the task's full loss."""
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """T. None: 1 with ``rho``, 2 with ``weight``, as the papers have it."""

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
