"""L1-SP: a pull with a corner, by which weights return to the source exactly."""

from __future__ import annotations

from typing import ClassVar, Literal

from conservtl.bounds import NonNegative
from conservtl.methods._proximal import Proximal, with_proximal
from conservtl.methods.base import Span, Strategy, TestFields
from conservtl.plan.plan import Plan

__all__ = ["L1SP"]


class L1SP(Strategy):
    r"""Pull single weights back to where they started, until few differ from the source.

    .. math:: \alpha \lVert w_S - w^0_S \rVert_1 + \frac{\beta}{2} \lVert w_N \rVert_2^2

    with S what came from the source, N what is new; sums, so that alpha does not depend on the number of parameters or
    on the batch size. The first part is no gradient but a proximal step after the optimizer's, at the group's rate:

    .. math:: w = w^0 + \operatorname{sign}(d) \max(0, |d| - \eta \alpha), \qquad d = v - w^0

    so a weight moved by less than that equals the source's bit for bit. Under plain SGD this is the penalty's own
    proximal gradient method; under Adam, whose statistics it leaves alone, a decoupled pull: alpha is then measured
    against steps of about the rate in size, so from 1 on nothing leaves the source where steps do not agree.

    The optimizer's own weight decay is 0 on what alpha or beta covers. Together with ``L2SP`` it is an elastic net.

    Measured with its defaults against plain fine-tuning at 1e-4, in points of the harmonic mean of both domains, for a
    new speaker with one and five recordings a word and for corrupted images: +0.2 ± 0.3, +0.3 ± 0.2 and -0.3 ± 0.9
    (benchmarks/results/methods.md).

    Cost: four passes over the weights a step and one over the source's.

    Reference:
        Li, Grandvalet and Davoine 2018, "Explicit inductive bias for transfer learning with convolutional networks",
        section 3. The step: Parikh and Boyd 2014, "Proximal algorithms", section 6.5.2.
    """

    kind: Literal["l1_sp"] = "l1_sp"
    test_fields: ClassVar[TestFields] = ({"alpha": Span(0.1, 1), "beta": [None, 0.01]},)
    alpha: NonNegative = 0.1
    """Strength on parameters from the source."""
    beta: NonNegative | None = 0.01
    """Strength of plain L2 on fresh parameters, part of the gradient. None: they are left to others."""
    on: Literal["weights", "all"] = "weights"
    """weights: two dimensions or more and not owned by a norm. all: biases and norms too."""

    def apply(self, plan: Plan) -> Plan:
        """Add the update, decays for fresh rows, and keep weight decay off."""
        update = Proximal(by=self.label, names=(), alpha=self.alpha, penalty="l1")
        return with_proximal(plan, update, self.beta, everything=self.on == "all")
