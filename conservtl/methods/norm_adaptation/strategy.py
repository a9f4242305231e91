"""Adaptation of norms: their statistics, their scales and shifts, or both."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import nn

from conservtl.errors import SpecError
from conservtl.methods.base import Order, Strategy
from conservtl.methods.norm_adaptation.instance_statistics import InstanceStatistics
from conservtl.methods.norm_adaptation.norm_statistics import NormStatisticsMeasure
from conservtl.plan.plan import Plan
from conservtl.runtime.freezing import keeps_batch_statistics

__all__ = ["NormAdaptation"]

_PRIOR = {"mixed": 16, "instance": 5}


class NormAdaptation(Strategy):
    r"""Give the norms the target's statistics before training, train their scales and shifts, freeze the rest.

    .. math:: \bar\mu = \frac{N}{N + n} \mu_s + \frac{n}{N + n} \mu_t \qquad
              \bar\sigma^2 = \frac{N}{N + n} \sigma_s^2 + \frac{n}{N + n} \sigma_t^2

    with n the number of the target's adaptation examples, N the ``prior``. They are measured over all of the adaptation
    data as it stands, without augmentation, norm by norm behind those adapted already, so that neither the size nor
    the order of batches matters; then they stand still, in training too. Fresh norms follow their batches as ever.

    ``statistics="instance"`` measures nothing: each example, of the source or the target, in training and after, is
    normalised by the source's statistics mixed with its own, n = 1, so that an example of whichever domain comes with
    what it needs to be seen; ``train="all"`` leaves the rest to other strategies. What it brings to corrupted images is
    measured with the recipe for them (benchmarks/results/methods.md). It stays with the adapted model, which ``merged``
    keeps and a run's folder tells. Where a norm sees one value a channel and example (behind a linear map) it goes by
    the source's statistics alone.

    ``train="nothing"`` is statistics alone (adaptive batch normalisation): without anything fresh no step is made.
    ``train="affine"`` leaves a batch norm's two numbers a channel to train, and works on layer norms too, with
    ``statistics="source"``. What is fresh is trained in any case.

    Measured with its defaults against plain fine-tuning at 1e-4, in points of the harmonic mean of both domains, for a
    new speaker with one and five recordings a word and for corrupted images: -0.4 ± 0.4, -0.5 ± 0.3 and -8.1 ± 2.2
    (benchmarks/results/methods.md). So the default, norms alone on mixed statistics, loses to it.

    Cost: before training a forward pass over the adaptation data for each norm, up to that norm; afterwards none. For
    ``instance`` nothing before, and at each norm its input's mean and variance once more, in training and after.

    Reference:
        Li, Wang, Shi, Liu and Hou 2017, "Revisiting batch normalization for practical domain adaptation" (the target's
        own statistics). Schneider et al. 2020, "Improving robustness against common corruptions by covariate shift
        adaptation", section 3 (the mixture; with n = 1 that of one example). Wang et al. 2021, "Tent: Fully test-time
        adaptation by entropy minimization", section 3.2 (scales and shifts alone, there without labels).
    """

    kind: Literal["norm_adaptation"] = "norm_adaptation"
    order: ClassVar[Order] = Order.HEAD
    train: Literal["affine", "nothing", "all"] = "affine"
    """affine: scales and shifts of the norms alone; nothing: the statistics only; all: no freezing."""
    head: bool = False
    """Whether the head is trained too where it comes from the source. What is fresh always is."""
    statistics: Literal["source", "target", "mixed", "instance"] = "mixed"
    """Whose statistics the norms go by."""
    prior: Annotated[int, Field(ge=0)] | None = None
    """N, for mixed and instance: how many examples the source's statistics weigh as much as; None: 16 and 5. One as
    large as the adaptation data keeps more of the source."""
    required: bool = True
    """Whether a model without a batch norm that keeps statistics is refused; else it is left as it is."""

    def concerns(self, model: nn.Module) -> bool:
        """Whether it is required, or the model has such a norm."""
        return self.required or any(map(keeps_batch_statistics, model.modules()))

    def apply(self, plan: Plan) -> Plan:
        """Choose what is frozen, hold the statistics, and ask for the measurement."""
        free = {row.name for row in plan.rows if row.origin == "fresh"}
        free |= set(plan.head) if self.head else set()
        if self.train == "affine":
            norms = {row.name for row in plan.rows if row.kind == "norm" and not row.added}
            if not norms:
                raise SpecError(
                    f"{self.label}: train='affine' trains the scales and shifts of norms, and the model has none. "
                    "Use train='all' or 'nothing', or another strategy."
                )
            free |= norms
        if self.train != "all":
            rows = [row for row in plan.rows if "frozen" in row.chosen or not row.frozen]  # what has no gradient stays
            frozen = {row.name: {"frozen": row.name not in free} for row in rows}
            plan = plan.choose(self.label, "frozen", frozen, explicit=False)
        prior = _PRIOR.get(self.statistics, 0) if self.prior is None else self.prior
        # All layers, not norms alone: a norm without parameters has no row of its own.
        copied = tuple(row.name for row in plan.rows if row.origin == "source")
        plan = plan.choose(self.label, "statistics", {name: {"statistics": "hold"} for name in copied}, explicit=False)
        if self.statistics == "source" or not copied:
            return plan
        if self.statistics == "instance":
            return plan.with_extension(InstanceStatistics(by=self.label, share=1 / (prior + 1), names=copied))
        return plan.with_measure(NormStatisticsMeasure(by=self.label, prior=prior if self.statistics == "mixed" else 0))
