"""Conservation of outputs: KLD-regularised adaptation, learning without forgetting."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from conservtl.conserve.outputs import OutputTerm
from conservtl.plan import Plan
from conservtl.strategies.base import Strategy

__all__ = ["OutputConservation"]

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
            return plan.with_term(OutputTerm(by=self.label, weight=self.weight, temperature=self.temperature or 2.0))
        rho = _RHO if self.rho is None else self.rho
        return plan.with_term(
            OutputTerm(
                by=self.label,
                task=1 - rho,
                weight=rho,
                temperature=self.temperature or 1.0,
                divergence="cross_entropy",
            )
        )
