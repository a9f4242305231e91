"""Mixout: dropout whose zero is the source."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from conservtl.conserve.mixout import Mixed
from conservtl.plan import Plan
from conservtl.strategies.base import Strategy

__all__ = ["Mixout"]


class Mixout(Strategy):
    r"""Train with a random part of the weights at the source's values.

    Forward passes in train mode and with gradients see

    .. math:: \frac{(1 - M) \odot w^0 + M \odot w - p\,w^0}{1 - p} = w^0 + \frac{M \odot (w - w^0)}{1 - p}, \qquad
        M \sim \operatorname{Bernoulli}(1 - p)

    whose mean over masks is w; all others see w. A mask has an element for each of a parameter's, and is drawn anew for
    every step of the optimizer: all forward passes of one step, accumulated batches included, share it, and so do all
    processes. p = 0 is plain training to the bit. It acts as an L2 pull toward the source whose strength grows with p
    and with the loss's curvature; it depends on neither the batch size nor the rate.

    From the forward pass to the step the model holds the mixed weights. Saving or evaluating it in between puts the
    plain ones back; ``adaptation.settle()`` does so too. A pull toward the source goes by the plain weights; only
    ``penalty()`` as a term of a loop's own loss sees the mixed ones.

    Measured with its defaults against plain fine-tuning at 1e-4, in points of the harmonic mean of both domains, for a
    new speaker with one and five recordings a word and for corrupted images: +0.1 ± 0.4, +0.2 ± 0.3 and +0.0 ± 0.7
    (benchmarks/results/methods.md).

    Cost: memory for the weights once more and for the masks between forward pass and step; six passes over the
    weights, and the masks to draw. Not for sharded parameters.

    Reference:
        Lee, Cho and Kang 2020, "Mixout: effective regularization to finetune large-scale pretrained language models",
        equation 4.
    """

    kind: Literal["mixout"] = "mixout"
    p: Annotated[float, Field(ge=0, lt=1)] = 0.7
    """Share of the elements at the source's values, to 1/65,536."""
    on: Literal["weights", "all"] = "weights"
    """weights: two dimensions or more and not owned by a norm. all: biases and norms too."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Of the masks."""

    def apply(self, plan: Plan) -> Plan:
        """Add the update."""
        names = tuple(
            row.name
            for row in plan.rows
            if row.origin == "source" and not row.frozen and (self.on == "all" or row.kind == "weight")
        )
        return plan.with_update(Mixed(by=self.label, names=names, p=self.p, seed=self.seed))
