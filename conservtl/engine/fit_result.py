"""The result of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from conservtl.errors import counted
from conservtl.fragments import fragment, html_table, text_table

__all__ = ["FitResult"]

_SHOWN = 12  # epochs in a notebook


@dataclass(frozen=True)
class FitResult:
    """Result of a run; printed, it shows a table of its epochs.

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
        execution: how the run computed, in words: device, channels-last, fused, compiled, tf32, precision, batches.
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
    execution: str = ""

    def __str__(self) -> str:
        title, header, rows, notes = self._shown()
        return "\n".join([title, text_table(header, rows, {1}), *notes])

    def _repr_html_(self) -> str:
        title, header, rows, notes = self._shown()
        return fragment(html_table(header, rows, {1}), title=title, notes=notes)

    def _shown(self) -> tuple[str, list[str], list[list[str]], list[str]]:
        """Return title, header, rows and notes of the table of epochs."""
        best = "" if self.best is None else f", best validation score {self.best:.4g}"
        how = self.execution or f"{self.device}, {self.precision}"
        title = f"{counted(self.steps, 'step')} in {self.seconds:.1f} s on {how}{best}"
        sets = dict.fromkeys(
            (name, metric)
            for line in self.history
            for name, values in line.items()
            if isinstance(values, Mapping) and name != "valid"
            for metric in values
        )
        header = ["epoch", "phase", "loss", *(f"{name} {metric}" for name, metric in sets)]
        rows = [
            [
                str(line["epoch"]),
                str(line["phase"]),
                _shown(line.get("loss")),
                *(_shown(line.get(name, {}).get(metric)) for name, metric in sets),
            ]
            for line in self._some_lines()
        ]
        left = len(self.history) - len(rows)
        notes = [f"{counted(left, 'epoch', 'is')} left out here; history has all."] if left else []
        notes += [f"after  {name}: {facts}" for name, facts in self.after.items()]
        return title, header, rows, notes

    def _some_lines(self) -> list[dict[str, Any]]:
        """Return the lines of evaluated epochs, or all if none was; evenly spread and the last among them, if many."""
        evaluated = [line for line in self.history if any(isinstance(value, Mapping) for value in line.values())]
        lines = evaluated or list(self.history)
        if len(lines) <= _SHOWN:
            return lines
        return [lines[round(place * (len(lines) - 1) / (_SHOWN - 1))] for place in range(_SHOWN)]


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, (int, float)) else "–"
