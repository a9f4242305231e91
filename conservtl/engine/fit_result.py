"""The result of a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["FitResult"]


@dataclass(frozen=True)
class FitResult:
    """What a run did.

    Args:
        history: a line an epoch: epoch, step, phase, loss, lr, seconds, the metrics of each set under its name,
            and under ``valid`` those that were selected on. Where nothing is trained one line, of epoch 0.
        steps: optimizer steps done.
        best: the best validation score, higher is better, with ``keep="path"`` that of the weights kept; None without
            a validation set or without the metric to select on.
        seconds: wall clock, with what was spent before the run was resumed.
        precision: fp32, bf16 or fp16.
        device: where it ran.
        kept_outputs: whether a frozen input side was computed once only, in some phase.
        after: what was done once training was over, by its name in the plan; under ``path`` the t that
            ``keep="path"`` chose, and the metrics on the validation parts at every point.
        path: the sets of ``path`` evaluated between the starting point (t = 0) and the trained weights (t = 1), each
            entry with t, the metrics of each set, and whether it was kept.
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
