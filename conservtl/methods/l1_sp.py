"""L1-SP: a penalty with a corner, by which weights return to the source exactly."""

from __future__ import annotations

from typing import ClassVar, Literal

from conservtl.bounds import NonNegative
from conservtl.methods._pulls import Proximal, with_proximal
from conservtl.methods._rows import Coverage
from conservtl.methods.base import Span, Strategy, TestFields
from conservtl.plan.plan import Plan

__all__ = ["L1SP"]


class L1SP(Strategy):
    r"""Pull single weights back to their starting values, until few differ from the source.

    .. math:: \alpha \lVert w_S - w^0_S \rVert_1 + \frac{\beta}{2} \lVert w_N \rVert_2^2

    with S the parameters from the source and N the fresh ones. Both parts are sums, so that alpha depends on neither
    the number of parameters nor the batch size. The first part is not added to the gradient; it is a proximal step
    after the optimizer's step to v, at the rate eta of the group:

    .. math:: w = w^0 + \operatorname{sign}(d) \max(0, |d| - \eta \alpha), \qquad d = v - w^0

    A weight that the optimizer moved by less than that equals the source's bit for bit. Under plain SGD this is the
    proximal gradient method of the penalty. Under Adam, whose statistics it leaves alone, it is a decoupled pull:
    alpha is compared with steps of about the size of the rate, so that from 1 on, weights whose steps do not agree
    stay at the source.

    The optimizer's own weight decay is 0 on every parameter that alpha or beta covers. Together with ``L2SP`` it is an
    elastic net; give both the same beta.

    Measured: docs/methods.md.

    Cost: four passes over the weights a step and one over the source's.

    Hurts: where all weights must move a little, or alpha is large for the rate: most weights then stay at the
    source.

    Reference:
        Li, Grandvalet and Davoine 2018, "Explicit inductive bias for transfer learning with convolutional networks",
        section 3. The step: Parikh and Boyd 2014, "Proximal algorithms", section 6.5.2.

    Example:
        >>> import torch, conservtl as ctl
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> adaptation = ctl.adapt(model, {"weight": torch.zeros(1, 2)}, [ctl.L1SP(alpha=0.5)])
        >>> optimizer = adaptation.optimizer(torch.optim.SGD, lr=1.0)
        >>> model.weight.grad = torch.tensor([[-0.4, -2.0]])
        >>> optimizer.step()  # to 0.4 and 2, then 0.5 back, at most to the source
        >>> model.weight.tolist()
        [[0.0, 1.5]]
    """

    kind: Literal["l1_sp"] = "l1_sp"
    test_fields: ClassVar[TestFields] = ({"alpha": Span(0.1, 1), "beta": [None, 0.01]},)
    alpha: NonNegative = 0.1
    """Strength on parameters from the source."""
    beta: NonNegative | None = 0.01
    """Strength of plain L2 on fresh parameters, part of the gradient. None: no plain L2."""
    on: Coverage = "weights"
    """weights: parameters of two dimensions or more that no norm owns. all: biases and norms too."""

    def apply(self, plan: Plan) -> Plan:
        """Add the proximal step on parameters from the source and plain L2 on fresh ones."""
        update = Proximal(by=self.label, names=(), alpha=self.alpha, penalty="l1")
        return with_proximal(plan, update, self.beta, self.on)
