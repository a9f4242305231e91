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

__all__ = ["SpectralShrinkage", "SpectralShrinkageTerm", "smallest_directions", "smallest_squares"]


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
    in double precision. On a GPU the host does not wait: the k directions come from products of matrices, about a
    hundred launches for each.

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
        """Return one line for the plan's table."""
        where = self.taps[0] if self.taps else f"the input of {' and '.join(self.enters)}"
        return f"{self.eta:g} × the {self.k} smallest squared singular values of a batch's features at {where}"

    def value(self, adapted: View, source: View | None, measured: Mapping[str, Any]) -> Tensor:  # noqa: ARG002
        """Return the term."""
        found = [tensor for layer in self.taps for tensor in all_of(adapted.features, layer)]
        found += [tensor for module in self.enters for tensor in all_of(adapted.entering, module)]
        if not found:  # the layer did not run in this pass
            return torch.zeros(())
        return self.eta * torch.stack([smallest_squares(features, self.k) for features in found]).mean()


def smallest_squares(features: Tensor, k: int, *, waits: bool | None = None) -> Tensor:
    """Return the sum of the k smallest squared singular values, or of all if there are fewer.

    They are eigenvalues of the Gram matrix of the shorter side, F F^T or F^T F, in double precision: exact to 2^-52 of
    the largest square, where single precision would lose the smallest ones. NaN if a feature is not finite, which the
    decomposition would refuse. On a GPU ``eigvalsh`` would make the host wait, because torch checks that it converged:
    there the sum is the squared norm of F along ``smallest_directions``, whose gradient is the same.

    Args:
        features: (N, ...), one example a row.
        k: number of singular values.
        waits: whether the host may wait for the device; None: not on a GPU.
    """
    waits = not features.is_cuda if waits is None else waits
    rows = features.flatten(1).double()
    finite = rows.isfinite().all()
    rows = torch.where(finite, rows, torch.zeros_like(rows))
    with torch.autocast(rows.device.type, enabled=False):
        wide = rows if len(rows) <= rows.shape[1] else rows.T
        if waits:
            least = torch.linalg.eigvalsh(wide @ wide.T)[:k].clamp(min=0).sum()  # in ascending order
        elif k < len(wide):
            least = (smallest_directions((wide @ wide.T).detach(), k) @ wide).square().sum()
        else:
            least = rows.square().sum()
    least = least.to(features.dtype if features.dtype == torch.float64 else torch.float32)
    return torch.where(finite, least, torch.nan)


def smallest_directions(gram: Tensor, k: int) -> Tensor:
    """Return k orthogonal directions of the smallest eigenvalues, (k, n), without a wait for the device.

    The inverse, squared m times, keeps the direction of the smallest eigenvalue alone, or several whose eigenvalues
    differ by less than 2^-m of their size, of which any does. It is then moved out of the way by the trace, for the
    next.

    Args:
        gram: positive semidefinite, (n, n), in double precision.
        k: less than n.
    """
    found: list[Tensor] = []
    trace = gram.diagonal().sum().clamp(min=_LEAST)
    gram = gram + torch.diag((trace * _SHIFT).expand(len(gram)))
    for _ in range(k):
        power, _ = torch.linalg.inv_ex(gram)
        for _ in range(_SQUARINGS):
            power = power / power.diagonal().sum()
            power = power @ power
        place = power.diagonal().argmax().reshape(1)
        direction = power.index_select(0, place)[0]
        for other in found:  # what rounding left of them
            direction = direction - other * (other @ direction)
        found.append(direction / direction.norm())
        gram = gram + trace * torch.outer(found[-1], found[-1])
    return torch.stack(found)


_SQUARINGS = 30  # m: eigenvalues that differ by less than 2^-30 of their size count as equal
_SHIFT = 2.0**-50  # of the trace: singular matrices have an inverse then
_LEAST = 1e-280  # trace of a matrix of zeros
