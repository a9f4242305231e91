"""L2-SP on the weights that an adapter changes, from its factors alone."""

from __future__ import annotations

from typing import ClassVar, Literal

from conservtl.bounds import NonNegative
from conservtl.methods.base import Strategy, TestFields
from conservtl.methods.l2_sp import Factors, MergedL2Penalty, with_merged_pull
from conservtl.plan.plan import Plan
from conservtl.plan.row import Anneal

__all__ = ["Factors", "MergedL2Penalty", "MergedL2SP"]


class MergedL2SP(Strategy):
    r"""Pull the weights that a LoRA adapter changes toward their source values.

    .. math:: \frac{\alpha}{2} \sum_l \lVert W_l - W^0_l \rVert_F^2
              = \frac{\alpha}{2} \sum_l s_l^2 \lVert B_l A_l \rVert_F^2
              = \frac{\alpha}{2} \sum_l s_l^2 \sum (B_l^\top B_l) \circ (A_l A_l^\top)

    with s the adapter's scale. It is the penalty of ``L2SP`` on the merged weights, with the gradients that it has in A
    and B. For factors that are named by hand; after ``conservtl.integrations.peft.adapt``, ``L2SP`` does the same by
    itself.

    Cost: two products of rank × rank for each weight a step; no weight of the base is read.

    Reference:
        Li, Grandvalet and Davoine 2018, "Explicit inductive bias for transfer learning with convolutional networks",
        equation 2, on the weights of Hu et al. 2022, "LoRA: Low-rank adaptation of large language models".
    """

    kind: Literal["merged_l2_sp"] = "merged_l2_sp"
    test_fields: ClassVar[TestFields] = ({"factors": ()},)
    alpha: NonNegative = 0.1
    """Strength on the change of each weight."""
    mode: Literal["coupled", "decoupled"] = "coupled"
    """coupled: part of the gradients of A and B. decoupled: a step of their own, rate × gradient."""
    depth: tuple[NonNegative, NonNegative] | None = None
    """Factors on alpha at the input and at the output side, linear in between. None: 1."""
    normalize: Literal["none", "per_parameter"] = "none"
    """per_parameter: alpha is divided by the number of elements of the weights that are changed."""
    anneal: Anneal | None = None
    """Factor on alpha over the optimizer's steps. None: 1."""
    factors: tuple[Factors, ...] = ()
    """The factors of each weight."""

    def apply(self, plan: Plan) -> Plan:
        """Add the pull, and no plain L2 on its factors."""
        names = [name for pair in self.factors for name in (pair.a, pair.b) if name in plan]
        plan = plan.choose(self.label, "decay", {name: {"decay": 0.0} for name in names})
        near, far = self.depth or (1.0, 1.0)
        divisor = sum(pair.size for pair in self.factors) if self.normalize == "per_parameter" else 1
        strong = (
            pair.model_copy(update={"strength": self.alpha * (near + (far - near) * plan[pair.b].depth) / divisor})
            for pair in self.factors
        )
        return with_merged_pull(plan, self.label, strong, self.mode, self.anneal)
