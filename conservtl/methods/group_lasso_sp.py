"""Group-lasso-SP: whole output channels return to the source."""

from __future__ import annotations

from typing import ClassVar, Literal

from conservtl.bounds import NonNegative
from conservtl.methods._proximal import Proximal, with_proximal
from conservtl.methods.base import Span, Strategy, TestFields
from conservtl.plan.plan import Plan

__all__ = ["GroupLassoSP"]


class GroupLassoSP(Strategy):
    r"""Pull output channels back to where they started, until few channels differ from the source at all.

    .. math:: \alpha \sum_g \sqrt{n_g}\, \lVert w_g - w^0_g \rVert_2 + \frac{\beta}{2} \lVert w_N \rVert_2^2

    with g the output channels (rows along the first dimension) of what came from the source, n_g the elements of one,
    N what is new; sums, so that alpha does not depend on the number of parameters or on the batch size. The first part
    is no gradient but a proximal step after the optimizer's, at the group's rate:

    .. math:: w_g = w^0_g + \max\left(0, 1 - \frac{\eta \alpha \sqrt{n_g}}{\lVert d_g \rVert_2}\right) d_g,
        \qquad d_g = v_g - w^0_g

    so a channel moved by less equals the source's bit for bit. Under plain SGD this is the penalty's own proximal
    gradient method; under Adam, whose statistics it leaves alone, a decoupled pull.

    The optimizer's own weight decay is 0 on what alpha or beta covers.

    Measured with its defaults against plain fine-tuning at 1e-4, in points of the harmonic mean of both domains, for a
    new speaker with one and five recordings a word and for corrupted images: +0.1 ± 0.2, +0.2 ± 0.2 and -0.2 ± 0.8
    (benchmarks/results/methods.md).

    Cost: three passes over the weights a step and one over the source's.

    Reference:
        Li, Grandvalet and Davoine 2018, "Explicit inductive bias for transfer learning with convolutional networks",
        section 3. The step: Parikh and Boyd 2014, "Proximal algorithms", section 6.5.1.
    """

    kind: Literal["group_lasso_sp"] = "group_lasso_sp"
    test_fields: ClassVar[TestFields] = ({"alpha": Span(0.1, 1), "beta": [None, 0.01]},)
    alpha: NonNegative = 0.1
    """Strength on parameters from the source."""
    beta: NonNegative | None = 0.01
    """Strength of plain L2 on fresh parameters, part of the gradient. None: they are left to others."""
    on: Literal["weights", "all"] = "weights"
    """weights: two dimensions or more and not owned by a norm. all: biases and norms too, each element a group."""

    def apply(self, plan: Plan) -> Plan:
        """Add the update, decays for fresh rows, and keep weight decay off."""
        update = Proximal(by=self.label, names=(), alpha=self.alpha, penalty="group_lasso")
        return with_proximal(plan, update, self.beta, everything=self.on == "all")
