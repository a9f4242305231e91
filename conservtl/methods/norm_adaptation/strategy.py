"""Adaptation of norms: their statistics, their scales and shifts, or both."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import nn

from conservtl.bounds import NonNegativeInt
from conservtl.errors import SpecError
from conservtl.methods._rows import freeze_all_but, train_named
from conservtl.methods.base import Order, Strategy
from conservtl.methods.norm_adaptation.instance_statistics import InstanceStatistics
from conservtl.methods.norm_adaptation.norm_statistics import NormStatisticsMeasure
from conservtl.plan.plan import Plan
from conservtl.runtime.freezing import keeps_batch_statistics

__all__ = ["NormAdaptation"]

_PRIOR = {"mixed": 16, "instance": 5}


class NormAdaptation(Strategy):
    r"""Give norms the target's statistics before training, train their scales and shifts, and freeze the rest.

    .. math:: \bar\mu = \frac{N}{N + n} \mu_s + \frac{n}{N + n} \mu_t \qquad
              \bar\sigma^2 = \frac{N}{N + n} \sigma_s^2 + \frac{n}{N + n} \sigma_t^2

    with n the number of the target's adaptation examples and N the ``prior``. The statistics are measured over all of
    the adaptation data without augmentation, norm by norm in the order of the forward pass, each behind norms that are
    adapted already: neither the size nor the order of batches matters. Then they are held, in training too. Fresh
    norms follow their batches.

    ``statistics="instance"`` measures nothing. In training and after, each example is normalised by the source's
    statistics mixed with its own, n = 1, whichever domain it is from. Use ``train="all"`` to leave the choice of
    trained parameters to other strategies. The mixture is part of the adapted model: ``merged`` keeps it, and so does
    a run's folder. A norm that sees one value for each channel and example (behind a linear map) uses the source's
    statistics alone.

    ``train="nothing"`` adapts the statistics alone (adaptive batch normalisation); no step is made unless something is
    fresh. ``train="affine"`` trains a batch norm's two numbers for each channel; with ``statistics="source"`` it suits
    layer norms too. Fresh parameters are trained in any case. Norms that were frozen when the model was handed in stay
    frozen and get the measured statistics all the same; ``head=True`` trains a head that was frozen so.

    Measured: docs/methods.md.

    Cost: before training, one forward pass over the adaptation data for each norm, up to that norm; afterwards none.
    For ``instance`` none before, and at each norm the mean and variance of its input, in training and after.

    Hurts: where target batches are small or of few classes: their statistics are then those of a few examples; the
    source's are lost.

    Reference:
        Li, Wang, Shi, Liu and Hou 2017, "Revisiting batch normalization for practical domain adaptation" (the target's
        own statistics). Schneider et al. 2020, "Improving robustness against common corruptions by covariate shift
        adaptation", section 3 (the mixture; n = 1 for one example). Wang et al. 2021, "Tent: Fully test-time
        adaptation by entropy minimization", section 3.2 (scales and shifts alone, there without labels).

    Example:
        >>> import torch, conservtl as ctl
        >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(1), torch.nn.Flatten(), torch.nn.Linear(2, 1))
        >>> source = {**model.state_dict(), "0.running_mean": torch.tensor([4.0])}
        >>> adaptation = ctl.adapt(model, source, [ctl.NormAdaptation(prior=1)])
        >>> adaptation.plan.trained
        ('0.weight', '0.bias')
        >>> adaptation.measure([(torch.zeros(3, 1, 2), torch.zeros(3))])  # three examples of mean 0
        >>> model[0].running_mean  # (1 × 4 + 3 × 0) / (1 + 3)
        tensor([1.])
    """

    kind: Literal["norm_adaptation"] = "norm_adaptation"
    order: ClassVar[Order] = Order.HEAD
    train: Literal["affine", "nothing", "all"] = "affine"
    """affine: scales and shifts of the norms alone. nothing: the statistics only. all: nothing is frozen."""
    head: bool = False
    """Whether a head from the source is trained too; a fresh one always is."""
    statistics: Literal["source", "target", "mixed", "instance"] = "mixed"
    """Statistics that the norms use."""
    prior: NonNegativeInt | None = None
    """N, for mixed and instance: number of examples that the source's statistics weigh as much as. None: 16 for mixed,
    5 for instance. A prior as large as the adaptation data keeps more of the source."""
    padding: Literal["leave_out", "count"] = "leave_out"
    """leave_out: statistics of the target and of each example leave out padding that the model's arguments name
    (``lengths``, ``attention_mask``, ...; as ``adaptation.loss`` finds it). count: padding is part of them."""
    required: bool = True
    """Whether a model without a batch norm that keeps statistics is refused; if not, the strategy is left out there."""

    def concerns(self, model: nn.Module) -> bool:
        """Return whether the strategy is required, or the model has a batch norm that keeps statistics."""
        return self.required or any(map(keeps_batch_statistics, model.modules()))

    def apply(self, plan: Plan) -> Plan:
        """Choose the parameters that are frozen, hold the statistics, and add the measurement or the mixture."""
        if self.train != "all":
            plan = freeze_all_but(plan, self.label, self._trained(plan))
            plan = train_named(plan, self.label, plan.head if self.head else ())
        # Rows of all layers, not of norms alone: a norm without parameters has no row of its own.
        copied = tuple(row.name for row in plan.rows if row.origin == "source")
        plan = plan.choose(self.label, "statistics", {name: {"statistics": "hold"} for name in copied}, explicit=False)
        if self.statistics == "source" or not copied:
            return plan
        prior = _PRIOR.get(self.statistics, 0) if self.prior is None else self.prior
        if self.statistics == "instance":
            share = 1 / (prior + 1)
            return plan.with_extension(
                InstanceStatistics(by=self.label, share=share, names=copied, padding=self.padding)
            )
        prior = prior if self.statistics == "mixed" else 0
        return plan.with_measure(NormStatisticsMeasure(by=self.label, prior=prior, padding=self.padding))

    def _trained(self, plan: Plan) -> set[str]:
        """Return the parameters that are not frozen."""
        trained = {*plan.fresh, *(plan.head if self.head else ())}
        if self.train == "nothing":
            return trained
        norms = {row.name for row in plan.rows if row.kind == "norm" and not row.added}
        others = self.head or any(not plan[name].frozen for name in trained)
        if norms and not others and all(plan[name].as_found for name in norms):
            raise SpecError(
                f"{self.label}: train='affine' trains the scales and shifts of norms, and all of the model's were "
                "frozen when it was handed in. Call requires_grad_(True) on them before adapt, or use train='nothing'."
            )
        if not norms:
            raise SpecError(
                f"{self.label}: train='affine' trains the scales and shifts of norms, and the model has none. "
                "Use train='all' or 'nothing', or another strategy."
            )
        return trained | norms
