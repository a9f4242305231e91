"""Group-lasso-SP: whole output channels return to the source."""

from __future__ import annotations

from typing import ClassVar, Literal

from conservtl.bounds import NonNegative
from conservtl.methods._pulls import Proximal, with_proximal
from conservtl.methods._rows import Coverage
from conservtl.methods.base import Span, Strategy, TestFields
from conservtl.plan.plan import Plan

__all__ = ["GroupLassoSP"]


class GroupLassoSP(Strategy):
    r"""Pull output channels back to their starting values, until few channels differ from the source at all.

    .. math:: \alpha \sum_g \sqrt{n_g}\, \lVert w_g - w^0_g \rVert_2 + \frac{\beta}{2} \lVert w_N \rVert_2^2

    with g the output channels (rows along the first dimension) of the parameters from the source, n_g the number of
    elements of one, and N the fresh parameters. Both parts are sums, so that alpha depends on neither the number of
    parameters nor the batch size. The first part is not added to the gradient; it is a proximal step after the
    optimizer's step to v, at the rate eta of the group of the optimizer:

    .. math:: w_g = w^0_g + \max\left(0, 1 - \frac{\eta \alpha \sqrt{n_g}}{\lVert d_g \rVert_2}\right) d_g,
        \qquad d_g = v_g - w^0_g

    A channel that the optimizer moved by less than that equals the source's bit for bit. Under plain SGD this is the
    proximal gradient method of the penalty. Under Adam, whose statistics it leaves alone, it is a decoupled pull.

    The optimizer's own weight decay is 0 on every parameter that alpha or beta covers.

    Measured: docs/methods.md.

    Cost: three passes over the weights a step and one over the source's.

    Hurts: where every channel must move a little: channels return as a whole.

    Reference:
        Li, Grandvalet and Davoine 2018, "Explicit inductive bias for transfer learning with convolutional networks",
        section 3. The step: Parikh and Boyd 2014, "Proximal algorithms", section 6.5.1.

    Example:
        >>> import torch, conservtl as ctl
        >>> model = torch.nn.Linear(4, 2, bias=False)
        >>> adaptation = ctl.adapt(model, {"weight": torch.zeros(2, 4)}, [ctl.GroupLassoSP(alpha=0.5)])
        >>> optimizer = adaptation.optimizer(torch.optim.SGD, lr=1.0)
        >>> model.weight.grad = -torch.tensor([[0.4, 0.4, 0.4, 0.4], [2.0, 2.0, 2.0, 2.0]])
        >>> optimizer.step()  # norms of 0.8 and 4, of which 1 × 0.5 × sqrt(4) = 1 is taken
        >>> model.weight.tolist()
        [[0.0, 0.0, 0.0, 0.0], [1.5, 1.5, 1.5, 1.5]]
    """

    kind: Literal["group_lasso_sp"] = "group_lasso_sp"
    test_fields: ClassVar[TestFields] = ({"alpha": Span(0.1, 1), "beta": [None, 0.01]},)
    alpha: NonNegative = 0.1
    """Strength on parameters from the source."""
    beta: NonNegative | None = 0.01
    """Strength of plain L2 on fresh parameters, part of the gradient. None: no plain L2."""
    on: Coverage = "weights"
    """weights: parameters of two dimensions or more that no norm owns. all: biases and norms too, each element a
    group."""

    def apply(self, plan: Plan) -> Plan:
        """Add the proximal step on parameters from the source and plain L2 on fresh ones."""
        update = Proximal(by=self.label, names=(), alpha=self.alpha, penalty="group_lasso")
        return with_proximal(plan, update, self.beta, self.on)
