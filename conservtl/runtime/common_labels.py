"""Outputs of two models whose heads have some labels in common."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from conservtl.errors import SpecError, counted
from conservtl.plan.term import CLASS_AXIS

__all__ = ["CommonLabels"]


class CommonLabels:
    """The outputs of labels that the adapted model and the source model both have.

    Args:
        numbers: for each output of the adapted model that of the source with its label, or None.
    """

    def __init__(self, numbers: Sequence[int | None]) -> None:
        self._size = len(numbers)
        pairs = [(place, number) for place, number in enumerate(numbers) if number is not None]
        self._adapted, self._source = (torch.tensor(one) for one in zip(*pairs, strict=True))

    def of(self, adapted: Tensor, source: Tensor, axis: int | None = None) -> tuple[Tensor, Tensor]:
        """Return both models' outputs for these labels, in one order."""
        axes = [axis, CLASS_AXIS.get(adapted.ndim), *range(1, adapted.ndim)]
        found = next((one for one in axes if one is not None and self._fits(adapted.shape, source.shape, one)), None)
        if found is None:
            raise SpecError(
                f"labels: outputs must have one axis of {counted(self._size, 'label')}, the target's, and be "
                "like the source's on "
                f"all others; received shape {tuple(adapted.shape)}, and {tuple(source.shape)} of the source."
            )
        places, numbers = (one.to(adapted.device) for one in (self._adapted, self._source))
        return adapted.index_select(found, places), source.to(adapted.device).index_select(found, numbers)

    def _fits(self, adapted: torch.Size, source: torch.Size, axis: int) -> bool:
        others = [[size for place, size in enumerate(shape) if place != axis] for shape in (adapted, source)]
        return axis < len(adapted) == len(source) and adapted[axis] == self._size and others[0] == others[1]
