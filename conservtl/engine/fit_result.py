"""The result of a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["FitResult"]


@dataclass(frozen=True)
class FitResult:
    """Result of a run.

    Args:
        history: one line per epoch: epoch, step, phase, loss, lr, seconds, the metrics of each set under its name, and
            those of the validation sets under ``valid``. A plan that trains nothing has one line, of epoch 0.
        steps: optimizer steps.
        best: the best validation score, higher is better, with ``keep="path"`` that of the weights kept; None without
            a validation set or without the metric to select on.
        seconds: wall clock, with the time before the run was resumed.
        precision: fp32, bf16 or fp16.
        device: device of the run.
        kept_outputs: whether the outputs of a frozen input side were cached in some phase.
        after: name of each ``after`` decision of the plan -> its facts; under ``path`` the t that ``keep="path"``
            chose, and the metrics of the validation sets at every point.
        path: for each point between the starting point (t = 0) and the trained weights (t = 1): t, the metrics of the
            sets of ``path``, and whether it was kept.
    """

    history: tuple[dict[str, Any], ...]
    steps: int
    best: float | None
    seconds: float
    precision: str
    device: str
    kept_outputs: bool
    after: dict[str, Any] = field(default_factory=dict)
    path: tuple[dict[str, Any], ...] = ()
