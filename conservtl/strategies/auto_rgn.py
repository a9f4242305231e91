"""Auto-RGN: rates from relative gradient norms."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from conservtl.conserve.auto_rgn import RelativeRates
from conservtl.plan import Plan
from conservtl.strategies.base import Order, Strategy

__all__ = ["AutoRGN"]


class AutoRGN(Strategy):
    r"""Let each layer learn as fast as its gradient is large beside its weights.

    .. math:: \eta_l = \eta \, \frac{r_l}{\max_k r_k}, \qquad r_l = \frac{\lVert g_l \rVert_2}{\lVert w_l \rVert_2}

    over a layer's parameters that came from the source, g the loss's gradient before any pull. The first step decides
    at once; then every ``every`` steps the mean of r since the last decision does. The ratio does not depend on the
    batch size beyond the gradient's noise, nor on a loss scale. Whatever is fresh keeps its full rate, and so does a
    layer whose weights are all zero.

    The ratio multiplies the rate that a schedule, a phase or ``DiscriminativeLR`` gives, during the step alone; what
    the rate multiplies (a decoupled pull, a proximal step, weight decay) follows it. The optimizer and its statistics
    stay what they are.

    Measured with its defaults against plain fine-tuning at 1e-4, in points of the harmonic mean of both domains, for a
    new speaker with one and five recordings a word and for corrupted images: +0.0 ± 0.4, -0.0 ± 0.3 and +0.4 ± 0.8
    (benchmarks/results/methods.md).

    Cost: the norms of gradients and weights each step, groups for every layer; the host waits for the device once in
    ``every`` steps.

    Reference:
        Lee et al. 2022, "Surgical fine-tuning improves adaptation to distribution shifts", section 4: there a ratio
        for each tensor, once an epoch.
    """

    kind: Literal["auto_rgn"] = "auto_rgn"
    order: ClassVar[Order] = Order.HEAD  # its update stands first, so that the others see the rate it sets
    every: Annotated[int, Field(ge=1)] = 10
    """Steps from one decision to the next."""
    floor: Annotated[float, Field(ge=0, le=1)] = 0.0
    """The smallest ratio; 1 is plain training."""

    def apply(self, plan: Plan) -> Plan:
        """Add the update."""
        names = tuple(row.name for row in plan.rows if row.origin == "source" and not row.frozen)
        return plan.with_update(RelativeRates(by=self.label, names=names, every=self.every, floor=self.floor))
