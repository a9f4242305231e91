"""Batch spectral shrinkage: against what the source knows and the target does not need."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from conservtl.conserve.spectral import SpectralTerm
from conservtl.errors import SpecError
from conservtl.layers import select
from conservtl.plan import Plan
from conservtl.strategies.base import Strategy

__all__ = ["SpectralShrinkage"]


class SpectralShrinkage(Strategy):
    r"""Shrink the directions in which a batch's features vary least.

    .. math:: \eta \sum_{i=1}^{k} \sigma_{-i}^2

    with sigma_{-i} the i-th smallest singular value of the batch's feature matrix F, an example a row. They carry what
    little the target can use: negative transfer. It keeps nothing of the source, and stands beside a method that does.

    F is what the head gets, or what a layer gives (``layer``), flattened to (N, features). The singular values are
    those of the batch, as in the paper, so eta depends on the batch size: they grow with it, and there are as many as
    the batch has examples, or the features are, whichever is fewer. Where that is fewer than k, all are shrunk.

    Measured with its defaults against plain fine-tuning at 1e-4, in points of the harmonic mean of both domains, for a
    new speaker with one and five recordings a word and for corrupted images: -0.4 ± 0.5, -0.3 ± 0.5 and -0.3 ± 1.5
    (benchmarks/results/methods.md).

    Cost: the singular values of an N × features matrix a step, in float32; on a GPU that waits for the device.

    Reference:
        Chen, Wang, Fu, Long and Wang 2019, "Catastrophic forgetting meets negative transfer: Batch spectral shrinkage
        for safe transfer learning", section 4.
    """

    kind: Literal["spectral_shrinkage"] = "spectral_shrinkage"
    eta: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1e-3
    """Strength; the paper's is 0.001."""
    k: Annotated[int, Field(ge=1)] = 1
    """How many of the smallest singular values; the paper's is 1."""
    layer: str | None = None
    """The layer whose output is taken. None: the head's input."""

    def apply(self, plan: Plan) -> Plan:
        """Add the term."""
        if self.layer is None:
            head = plan.head_module
            return plan.with_term(SpectralTerm(by=self.label, enters=(head,), eta=self.eta, k=self.k))
        (found,) = select([self.layer], plan.layers, "layer").values()
        if len(found) > 1:
            raise SpecError(f"{self.label}: layer must mean one layer; {self.layer!r} matches {list(found)}. Name one.")
        return plan.with_term(SpectralTerm(by=self.label, taps=found, eta=self.eta, k=self.k))
