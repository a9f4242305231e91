"""Batch spectral shrinkage: against what the source knows and the target does not need."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from conservtl.errors import SpecError
from conservtl.layers import select
from conservtl.methods.base import Aliases, Span, Strategy, TestFields
from conservtl.plan.decision import Term, View
from conservtl.plan.plan import Plan

__all__ = ["SpectralShrinkage", "SpectralShrinkageTerm", "smallest_squares"]


class SpectralShrinkageTerm(Term):
    """The smallest squared singular values of the features of a batch."""

    kind: Literal["spectral"] = "spectral"
    eta: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    """Factor on their sum."""
    k: Annotated[int, Field(ge=1)] = 1
    """How many."""

    source: ClassVar[bool] = False

    def describe(self) -> str:
        """One line for the plan's table."""
        where = self.taps[0] if self.taps else f"the input of {self.enters[0]}"
        return f"{self.eta:g} × the {self.k} smallest squared singular values of a batch's features at {where}"

    def value(self, adapted: View, source: View | None, measured: Mapping[str, Any]) -> Tensor:  # noqa: ARG002
        """The term."""
        features = adapted.features[self.taps[0]] if self.taps else adapted.entering[self.enters[0]]
        return self.eta * smallest_squares(features, self.k)


def smallest_squares(features: Tensor, k: int) -> Tensor:
    """Sum of the k smallest squared singular values of features (N, ...), an example a row; all where there are fewer.

    In float32 at least, whatever the autocast. NaN where a feature is not finite, which the decomposition would refuse.
    """
    rows = features.flatten(1)
    if rows.dtype in (torch.float16, torch.bfloat16):
        rows = rows.float()
    finite = rows.isfinite().all()
    with torch.autocast(rows.device.type, enabled=False):
        values = torch.linalg.svdvals(torch.where(finite, rows, torch.zeros_like(rows)))
    # In descending order.
    return torch.where(finite, values[-k:].square().sum(), torch.nan)


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
    aliases: ClassVar[Aliases] = {"bss": {}}
    test_fields: ClassVar[TestFields] = ({"eta": Span(0.1, 1), "k": range(1, 4)},)
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
            return plan.with_term(SpectralShrinkageTerm(by=self.label, enters=(head,), eta=self.eta, k=self.k))
        (found,) = select([self.layer], plan.layers, "layer").values()
        if len(found) > 1:
            raise SpecError(f"{self.label}: layer must mean one layer; {self.layer!r} matches {list(found)}. Name one.")
        return plan.with_term(SpectralShrinkageTerm(by=self.label, taps=found, eta=self.eta, k=self.k))
