"""L2-SP, conservation training proper: a pull toward the source weights, plain L2 on fresh ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from conservtl.bounds import Count, NonNegative
from conservtl.errors import counted
from conservtl.kernels.deviation import together
from conservtl.kernels.low_rank import squared_change
from conservtl.methods._pulls import Quadratic, with_decay, with_quadratic
from conservtl.methods._rows import Coverage, covered_rows, fresh_rows
from conservtl.methods.base import Aliases, Span, Strategy, TestFields
from conservtl.plan.penalty import Penalty
from conservtl.plan.plan import Plan
from conservtl.plan.row import Anneal, Row
from conservtl.plan.update import Moving
from conservtl.spec_model import FrozenModel

__all__ = ["L2SP", "Factors", "L2Penalty", "MergedL2Penalty", "changed_weights", "with_merged_pull"]

_ALPHA = {"coupled": 0.1, "decoupled": 10.0}


class L2SP(Strategy):
    r"""Pull the weights from the source toward their starting values.

    .. math:: \frac{\alpha}{2} \lVert w_S - w^0_S \rVert_2^2 + \frac{\beta}{2} \lVert w_N \rVert_2^2

    with S the parameters from the source and N the fresh ones. Both parts are sums, not means, so that alpha depends
    on neither the number of parameters nor the batch size.

    ``coupled`` adds the gradient alpha (w - w0), exactly as the term in the loss would; Adam then rescales it with the
    rest. ``decoupled`` moves w by lr alpha (w0 - w) before the gradient step and leaves Adam's statistics alone. Under
    plain SGD the two are equal. Under Adam they are different methods, hence two defaults: 0.1 coupled (the authors'
    for SGD at 0.01) and 10 decoupled (at Adam's 1e-3, each step goes one percent of the way back).

    The optimizer's own weight decay is 0 on every parameter that alpha or beta covers. Of weights that ``LoRA``
    changes, the sum w + s B A is pulled: alpha/2 of the squared norm of s B A.

    Measured: docs/methods.md.

    Cost: one pass over the trained weights a step, and one copy of them on the device unless ``anchors`` says
    otherwise.

    Hurts: where the target needs weights far from the source: a large alpha holds them back, and with ``decoupled``
    a rate times alpha above 1 overshoots.

    Reference:
        Li, Grandvalet and Davoine 2018, "Explicit inductive bias for transfer learning with convolutional networks",
        equation 3. Decoupled: as Loshchilov and Hutter 2019 for weight decay, toward the source instead of zero.
        Annealed: Chen et al. 2020, "Recall and Learn" (RecAdam), whose pull fades while the target's loss fades in;
        here the target's loss has its full weight throughout.

    Example:
        >>> import torch, conservtl as ctl
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> adaptation = ctl.adapt(model, {"weight": torch.zeros(1, 1)}, [ctl.L2SP(alpha=0.5)])
        >>> optimizer = adaptation.optimizer(torch.optim.SGD, lr=0.1)
        >>> with torch.no_grad():
        ...     _ = model.weight.fill_(1.0)
        >>> adaptation.penalty().item()
        0.25
        >>> optimizer.step()  # no gradient of a loss: 1 - 0.1 × 0.5 × (1 - 0)
        >>> round(model.weight.item(), 3)
        0.95
    """

    kind: Literal["l2_sp"] = "l2_sp"
    aliases: ClassVar[Aliases] = {"l2sp": {}}
    test_fields: ClassVar[TestFields] = ({"depth": [None, (Span(0.1, 1), Span(0.1, 1))], "every": range(1, 4)},)
    alpha: NonNegative | None = None
    """Strength on parameters from the source. None: 0.1 coupled, 10 decoupled."""
    beta: NonNegative = 0.01
    """Strength of plain L2 on fresh parameters."""
    mode: Literal["coupled", "decoupled"] = "coupled"
    """coupled: part of the gradient. decoupled: a step of its own before the gradient step."""
    on: Coverage = "weights"
    """weights: parameters of two dimensions or more that no norm owns, embeddings and recurrent matrices included. all:
    biases and norms too."""
    depth: tuple[NonNegative, NonNegative] | None = None
    """Factors on alpha at the input and at the output side, linear in between. None: 1. Vision wants more at the input
    side, (1, 0.1) for example; speech at the output side, (0.1, 1)."""
    normalize: Literal["none", "per_parameter"] = "none"
    """none: the paper's sum. per_parameter: alpha and beta are divided by the number of elements they cover, so that a
    strength carries over from one model size to another; alpha must then be given, and is larger by that number."""
    anchors: Literal["fp32", "bf16", "cpu"] = "fp32"
    """Storage of the source values for the pull. fp32: as the parameters. bf16: half the memory; the pull leads to the
    rounded values, up to 2^-9 of each away. cpu: sent to the device at each step."""
    every: Count = 1
    """Steps from one pull to the next, which has the strength of all of them: a k-th of the time and traffic. Coupled,
    the gradient is added k times at once. Decoupled, each weight goes 1 - (1 - s)^k of the way, with s the share of one
    step. Plain L2 on fresh parameters acts in each step, and so does ``penalty()`` in a loss of your own."""
    anneal: Anneal | None = None
    """Factor on alpha over the optimizer's steps. None: 1."""

    @model_validator(mode="after")
    def _scale(self) -> Self:
        if self.normalize == "per_parameter" and self.alpha is None:
            raise ValueError("normalize='per_parameter' changes the scale of alpha, which has no default then: give it")
        return self

    def apply(self, plan: Plan) -> Plan:
        """Add the pull on rows from the source, or on the factors that change them, and plain L2 on fresh ones."""
        copied = [row for row in covered_rows(plan, self.on) if row.origin == "source"]
        factors = changed_weights(plan)
        fresh = fresh_rows(plan, self.on)
        divisor = self._divisor(row.size - row.copied_size for row in fresh)
        plan = with_decay(plan, self.label, {row.name: self.beta / divisor for row in fresh}, self.mode)
        penalty = L2Penalty(
            by=self.label, names=(), mode=self.mode, anchor=self.anchors, anneal=self.anneal, every=self.every
        )
        pulled = [row for row in copied if not factors or row.name in factors or not row.frozen]
        divisor = self._divisor(row.copied_size for row in pulled)
        strengths = {row.name: self._alpha_at(row) / divisor for row in copied}
        strong = [
            pair.model_copy(update={"strength": strengths[weight]})
            for weight, pair in factors.items()
            if weight in strengths
        ]
        return with_merged_pull(with_quadratic(plan, penalty, strengths), self.label, strong, self.mode, self.anneal)

    def _divisor(self, sizes: Iterable[int]) -> int:
        """Return the divisor of a strength on parameters that cover so many elements each."""
        return sum(sizes) if self.normalize == "per_parameter" else 1

    def _alpha_at(self, row: Row) -> float:
        """Return alpha at a row's depth."""
        alpha = _ALPHA[self.mode] if self.alpha is None else self.alpha
        near, far = self.depth or (1.0, 1.0)
        return alpha * (near + (far - near) * row.depth)


class L2Penalty(Quadratic):
    r"""A pull to the source, :math:`\frac{1}{2} \sum_j \alpha_j (w_j - w^0_j)^2`, with alpha in the rows."""

    kind: Literal["l2_sp"] = "l2_sp"
    column: ClassVar[Literal["pull", "decay"] | None] = "pull"

    def describe(self) -> str:
        """Return one line for the plan's table."""
        return f"pull of {counted(len(self.names), 'parameter')} to the source{self._rhythm}"


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


class MergedL2Penalty(Penalty):
    r"""Half the strength times each change's squared norm, :math:`\frac{1}{2} \sum_l \alpha_l s_l^2 |B_l A_l|^2`."""

    kind: Literal["merged_l2_sp"] = "merged_l2_sp"
    factors: tuple[Factors, ...]
    """The factors of each weight."""
    anchors: ClassVar[bool] = False

    def pull_on(self, row: Row) -> float | None:
        """Return the strength on the weight that a factor changes."""
        return next((pair.strength for pair in self.factors if row.name in (pair.a, pair.b)), None)

    def describe(self) -> str:
        """Return one line for the plan's table."""
        return f"pull of {counted(len(self.factors), 'weight')} to the source, by the adapter's factors"

    def value(self, moving: Sequence[Moving]) -> Tensor:
        """Return the penalty on the pairs that are trained now."""
        given = {item.name: item.parameter for item in moving}
        values = [
            pair.strength / 2 * squared_change(given[pair.a], given[pair.b], pair.scale)
            for pair in self.factors
            if pair.a in given and pair.b in given
        ]
        return together(values).sum() if values else _zero(moving)

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


def changed_weights(plan: Plan) -> dict[str, Factors]:
    """Return name of a weight -> the factors of its change, of all that the plan's rows record."""
    return {
        row.low_rank.weight: Factors(a=row.low_rank.a, b=row.name, scale=row.low_rank.scale)
        for row in plan.rows
        if row.low_rank is not None
    }


def with_merged_pull(
    plan: Plan,
    by: str,
    factors: Iterable[Factors],
    mode: Literal["coupled", "decoupled"] = "coupled",
    anneal: Anneal | None = None,
) -> Plan:
    """Return the plan with the pull of weights by their factors."""
    pulled = tuple(factors)
    if not pulled:
        return plan
    names = tuple(name for pair in pulled for name in (pair.a, pair.b))
    return plan.with_penalty(MergedL2Penalty(by=by, names=names, mode=mode, anneal=anneal, factors=pulled))
