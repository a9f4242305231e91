"""L2-SP, conservation training proper: a pull toward the source weights, plain L2 on what is new."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal, Self

from pydantic import model_validator

from conservtl.bounds import NonNegative
from conservtl.methods._quadratic import Quadratic, decayed, penalised
from conservtl.methods.base import Aliases, Span, Strategy, TestFields
from conservtl.plan.plan import Plan
from conservtl.plan.row import Anneal, Row

__all__ = ["L2SP", "L2Penalty"]

_ALPHA = {"coupled": 0.1, "decoupled": 10.0}


class L2Penalty(Quadratic):
    r"""A pull to the source: :math:`\frac{1}{2} \sum_j \alpha_j (w_j - w^0_j)^2`, alpha in the rows."""

    kind: Literal["l2_sp"] = "l2_sp"
    column: ClassVar[Literal["pull", "decay"] | None] = "pull"

    def describe(self) -> str:
        """One line for the plan's table."""
        return f"pull of {len(self.names)} parameters to the source"


class L2SP(Strategy):
    r"""Pull the weights that came from the source toward where they started.

    .. math:: \frac{\alpha}{2} \lVert w_S - w^0_S \rVert_2^2 + \frac{\beta}{2} \lVert w_N \rVert_2^2

    with S what came from the source, N what is new; sums, not means, so that alpha does not depend
    on the number of parameters or on the batch size.

    ``coupled`` adds the gradient alpha (w - w0), exactly as the term in the loss would: Adam then
    rescales it with the rest. ``decoupled`` moves w by lr alpha (w0 - w) before the gradient step
    and leaves Adam's statistics alone. Under plain SGD the two are equal; under Adam they are
    different methods, hence two defaults: 0.1 coupled (the authors' for SGD at 0.01), 10 decoupled
    (at Adam's 1e-3 each step goes one percent of the way back).

    The optimizer's own weight decay is 0 on every parameter covered by alpha or beta.

    Measured with its defaults against plain fine-tuning at 1e-4, in points of the harmonic mean of both domains, for a
    new speaker with one and five recordings a word and for corrupted images: coupled +0.1 ± 0.4, +0.2 ± 0.3 and +0.8 ±
    1.2; decoupled +0.1 ± 0.5, +0.2 ± 0.3 and +0.2 ± 1.3 (benchmarks/results/methods.md).

    Cost: one pass over the trained weights a step, and one copy of them on the device, unless ``anchors`` says
    otherwise.

    Reference:
        Li, Grandvalet and Davoine 2018, "Explicit inductive bias for transfer learning with
        convolutional networks", equation 3. Decoupled: as Loshchilov and Hutter 2019 for weight
        decay, toward the source instead of zero. Annealed: Chen et al. 2020, "Recall and Learn" (RecAdam), whose
        pull fades while the target's loss fades in; here the target's loss has its full weight throughout.
    """

    kind: Literal["l2_sp"] = "l2_sp"
    aliases: ClassVar[Aliases] = {"l2sp": {}}
    test_fields: ClassVar[TestFields] = ({"depth": [None, (Span(0.1, 1), Span(0.1, 1))]},)
    alpha: NonNegative | None = None
    """Strength on parameters from the source. None: 0.1 coupled, 10 decoupled."""
    beta: NonNegative = 0.01
    """Strength of plain L2 on fresh parameters."""
    mode: Literal["coupled", "decoupled"] = "coupled"
    """coupled: part of the gradient. decoupled: a step of its own before the gradient step."""
    on: Literal["weights", "all"] = "weights"
    """weights: two dimensions or more and not owned by a norm, embeddings and recurrent matrices
    included. all: biases and norms too."""
    depth: tuple[NonNegative, NonNegative] | None = None
    """Factors on alpha at the input and at the output side, linear in between. None: flat. Vision
    wants more at the input side, (1, 0.1) say; speech at the output side, (0.1, 1)."""
    normalize: Literal["none", "per_parameter"] = "none"
    """none: the paper's sum. per_parameter: alpha and beta are divided by the number of elements they cover, so
    that a strength can be carried from one model size to another; alpha must then be given, and is larger by that
    number."""
    anchors: Literal["fp32", "bf16", "cpu"] = "fp32"
    """How the source values are held for the pull: as the parameters are; in half the memory, rounded by up to
    2^-9 of each value, which is then where the pull leads; or on the CPU, sent to the device at each step."""
    anneal: Anneal | None = None
    """A factor on alpha that changes over the optimizer's steps. None: alpha stays."""

    @model_validator(mode="after")
    def _scale(self) -> Self:
        if self.normalize == "per_parameter" and self.alpha is None:
            raise ValueError("normalize='per_parameter' changes the scale of alpha, which has no default then: give it")
        return self

    def apply(self, plan: Plan) -> Plan:
        """Choose pulls for source rows and decays for fresh ones."""
        covered = plan.rows_on(self.on)
        old = [row for row in covered if row.origin == "source"]
        new = [row for row in covered if row.origin == "fresh"]
        plan = decayed(plan, self.label, {row.name: self.beta / self._count(new) for row in new}, self.mode)
        penalty = L2Penalty(by=self.label, names=(), mode=self.mode, anchor=self.anchors, anneal=self.anneal)
        return penalised(plan, penalty, {row.name: self._at(row) / self._count(old) for row in old})

    def _count(self, rows: Sequence[Row]) -> int:
        """What a strength is divided by."""
        return sum(row.size for row in rows) if self.normalize == "per_parameter" else 1

    def _at(self, row: Row) -> float:
        alpha = _ALPHA[self.mode] if self.alpha is None else self.alpha
        near, far = self.depth or (1.0, 1.0)
        return alpha * (near + (far - near) * row.depth)
