"""Batch spectral shrinkage: the weakest directions of a batch's features, made weaker."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from conservtl.decision import Term, View

__all__ = ["SpectralTerm", "smallest_squares"]


class SpectralTerm(Term):
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
