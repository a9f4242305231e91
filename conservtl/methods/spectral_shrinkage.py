"""Batch spectral shrinkage (BSS): shrink the directions in which a batch's features vary least."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from conservtl.bounds import Count, NonNegative
from conservtl.errors import SpecError
from conservtl.methods.base import Aliases, Span, Strategy, TestFields
from conservtl.plan.plan import Plan
from conservtl.plan.term import Term, View, all_of

__all__ = ["SpectralShrinkage", "SpectralShrinkageTerm", "smallest_squares"]


class SpectralShrinkage(Strategy):
    r"""Shrink the smallest singular values of a batch's features.

    .. math:: \eta \sum_{i=1}^{k} \sigma_{-i}^2

    with sigma_{-i} the i-th smallest singular value of the batch's feature matrix F, one example a row. These
    directions carry what the target can use least: negative transfer. The term conserves nothing of the source;
    combine it with a method that does.

    F is the head's input, or the output of a layer (``layer``), flattened to (N, features). As in the paper, the
    singular values are those of the batch, so eta depends on the batch size: they grow with it, and their number is
    that of the examples or of the features, whichever is smaller. If that is below k, all are shrunk.

    Measured: docs/methods.md.

    Cost: a step, the Gram matrix of N × features, and its eigenvalues, as many as there are examples or features; both
    in double precision. On a GPU the host waits for the device once a step, since torch checks that the decomposition
    converged.

    Hurts: where batches are smaller than the rank of useful features, which are then shrunk too.

    Reference:
        Chen, Wang, Fu, Long and Wang 2019, "Catastrophic forgetting meets negative transfer: Batch spectral shrinkage
        for safe transfer learning", section 4.

    Example:
        >>> import torch, conservtl as ctl
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 2, bias=False))
        >>> source = {"0.weight": torch.eye(2), "1.weight": torch.eye(2)}
        >>> adaptation = ctl.adapt(model, source, [ctl.SpectralShrinkage(eta=0.1)])
        >>> outputs = model(torch.tensor([[3.0, 0.0], [0.0, 2.0]]))  # the head's input has singular values 3 and 2
        >>> task = 0 * outputs.sum()
        >>> round(adaptation.loss(task, outputs).item(), 3)
        0.4
    """

    kind: Literal["spectral_shrinkage"] = "spectral_shrinkage"
    aliases: ClassVar[Aliases] = {"bss": {}}
    test_fields: ClassVar[TestFields] = ({"eta": Span(0.1, 1), "k": range(1, 4)},)
    eta: NonNegative = 1e-3
    """Strength; the paper's is 0.001."""
    k: Count = 1
    """Number of singular values to shrink; the paper's is 1."""
    layer: str | None = None
    """Layer whose output is F. None: the head's input."""

    def apply(self, plan: Plan) -> Plan:
        """Add the term."""
        if self.layer is None:
            heads = plan.head_modules
            return plan.with_term(SpectralShrinkageTerm(by=self.label, enters=heads, eta=self.eta, k=self.k))
        (matched,) = plan.select_layers([self.layer]).values()
        if len(matched) > 1:
            raise SpecError(
                f"{self.label}: layer must mean one layer; {self.layer!r} matches {list(matched)}. Name one."
            )
        return plan.with_term(SpectralShrinkageTerm(by=self.label, taps=matched, eta=self.eta, k=self.k))


class SpectralShrinkageTerm(Term):
    """Sum of the smallest squared singular values of a batch's features."""

    kind: Literal["spectral"] = "spectral"
    eta: NonNegative
    """Factor on the sum."""
    k: Count = 1
    """Number of singular values."""

    mean_over_batch: ClassVar[bool] = False  # singular values are those of a batch, as in the paper
    source: ClassVar[bool] = False

    def describe(self) -> str:
        """One line for the plan's table."""
        where = self.taps[0] if self.taps else f"the input of {' and '.join(self.enters)}"
        return f"{self.eta:g} × the {self.k} smallest squared singular values of a batch's features at {where}"

    def value(self, adapted: View, source: View | None, measured: Mapping[str, Any]) -> Tensor:  # noqa: ARG002
        """Return the term."""
        found = [tensor for layer in self.taps for tensor in all_of(adapted.features, layer)]
        found += [tensor for module in self.enters for tensor in all_of(adapted.entering, module)]
        if not found:  # the layer did not run in this pass
            return torch.zeros(())
        return self.eta * torch.stack([smallest_squares(features, self.k) for features in found]).mean()


def smallest_squares(features: Tensor, k: int) -> Tensor:
    """Return the sum of the k smallest squared singular values, or of all if there are fewer.

    They are eigenvalues of the Gram matrix of the shorter side, F F^T or F^T F, in double precision: exact to 2^-52 of
    the largest square, where single precision would lose the smallest ones. NaN if a feature is not finite, which the
    decomposition would refuse.

    Args:
        features: (N, ...), one example a row.
        k: number of singular values.
    """
    rows = features.flatten(1).double()
    finite = rows.isfinite().all()
    rows = torch.where(finite, rows, torch.zeros_like(rows))
    with torch.autocast(rows.device.type, enabled=False):
        gram = rows @ rows.T if len(rows) <= rows.shape[1] else rows.T @ rows
        squares = torch.linalg.eigvalsh(gram)[:k].clamp(min=0)  # in ascending order
    least = squares.sum().to(features.dtype if features.dtype == torch.float64 else torch.float32)
    return torch.where(finite, least, torch.nan)
