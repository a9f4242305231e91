"""L2-SP on the weights that an adapter changes, from its factors alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from conservtl.bounds import NonNegative
from conservtl.integrations.peft.lora import squared_change
from conservtl.methods.base import Strategy, TestFields
from conservtl.plan.penalty import Penalty
from conservtl.plan.plan import Plan
from conservtl.plan.row import Anneal
from conservtl.plan.update import Moving
from conservtl.spec_model import FrozenModel

__all__ = ["Factors", "MergedL2Penalty", "MergedL2SP"]


class Factors(FrozenModel):
    """The factors A and B of one weight's change, scale × B A."""

    a: str
    """Name of the parameter A."""
    b: str
    """Name of the parameter B."""
    scale: float
    """Factor on the product."""
    strength: NonNegative = 0.0
    """alpha on this weight."""
    size: Annotated[int, Field(ge=1)] = 1
    """Number of elements of the weight."""


class MergedL2SP(Strategy):
    r"""Pull the weights that a LoRA adapter changes toward their source values.

    .. math:: \frac{\alpha}{2} \sum_l \lVert W_l - W^0_l \rVert_F^2
              = \frac{\alpha}{2} \sum_l s_l^2 \lVert B_l A_l \rVert_F^2
              = \frac{\alpha}{2} \sum_l s_l^2 \sum (B_l^\top B_l) \circ (A_l A_l^\top)

    with s the adapter's scale. It is the penalty of ``L2SP`` on the merged weights, with the gradients that it has in A
    and B. ``conservtl.integrations.peft.adapt`` puts it in the place of ``L2SP`` and fills in the factors.

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
        if not self.factors:
            return plan
        names = tuple(name for pair in self.factors for name in (pair.a, pair.b))
        plan = plan.choose(self.label, "decay", {name: {"decay": 0.0} for name in names if name in plan})
        near, far = self.depth or (1.0, 1.0)
        divisor = sum(pair.size for pair in self.factors) if self.normalize == "per_parameter" else 1
        strong = tuple(
            pair.model_copy(update={"strength": self.alpha * (near + (far - near) * plan[pair.b].depth) / divisor})
            for pair in self.factors
        )
        return plan.with_penalty(
            MergedL2Penalty(by=self.label, names=names, mode=self.mode, anneal=self.anneal, factors=strong)
        )


class MergedL2Penalty(Penalty):
    r"""Half the strength times each change's squared norm, :math:`\frac{1}{2} \sum_l \alpha_l s_l^2 |B_l A_l|^2`."""

    kind: Literal["merged_l2_sp"] = "merged_l2_sp"
    factors: tuple[Factors, ...]
    """The factors of each weight."""
    anchors: ClassVar[bool] = False

    def describe(self) -> str:
        """One line for the plan's table."""
        return f"pull of {len(self.factors)} weights to the source, by the adapter's factors"

    def value(self, moving: Sequence[Moving]) -> Tensor:
        """Return the penalty on the pairs that are trained now."""
        given = {item.name: item.parameter for item in moving}
        values = [
            pair.strength / 2 * squared_change(given[pair.a], given[pair.b], pair.scale)
            for pair in self.factors
            if pair.a in given and pair.b in given
        ]
        return torch.stack([value.to(values[0].device) for value in values]).sum() if values else _zero(moving)

    def gradient(self, moving: Sequence[Moving]) -> list[Tensor]:
        """Return alpha s² (B^T B) A and alpha s² B (A A^T)."""
        given: dict[str, Any] = {item.name: item.parameter for item in moving}
        found: dict[str, Tensor] = {}
        for pair in self.factors:
            if pair.a not in given or pair.b not in given:
                continue
            a, b = given[pair.a].flatten(1), given[pair.b].flatten(1)
            factor = pair.strength * pair.scale**2
            found[pair.a] = (factor * (b.mT @ b) @ a).view_as(given[pair.a])
            found[pair.b] = (factor * b @ (a @ a.mT)).view_as(given[pair.b])
        return [found.get(item.name, torch.zeros_like(item.parameter)) for item in moving]


def _zero(moving: Sequence[Moving]) -> Tensor:
    return torch.zeros((), device=moving[0].parameter.device)
