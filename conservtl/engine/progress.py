"""Progress bar with steps per second and the last metrics."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

__all__ = ["Progress", "ShowMetric", "show_plainly"]

ShowMetric = Callable[[str, float], str]
"""From a metric's name and value to its text in the bar."""

_EVERY = 0.1  # seconds between updates of the bar


def show_plainly(metric: str, value: float) -> str:
    """Return a metric's name and its value with three decimals."""
    return f"{metric} {value:.3f}"


class Progress:
    """Shows steps, steps per second and the last evaluation on stderr.

    Args:
        steps: steps of the run, 0 if unknown.
        done: steps done before a run was resumed.
        shown: whether to show anything.
        show: writes metrics.
    """

    def __init__(self, steps: int, done: int = 0, *, shown: bool, show: ShowMetric = show_plainly) -> None:
        self._bar: Any = None
        self._show = show
        self._done = done
        self._due = 0.0
        if shown:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task("", total=steps or None, completed=done, rate="", note="")

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self) -> None:
        """Count one step."""
        self._done += 1
        if self._bar is not None and time.perf_counter() >= self._due:
            self._due = time.perf_counter() + _EVERY
            speed = self._bar.tasks[0].speed
            self._bar.update(self._task, completed=self._done, rate=f"{speed:.1f} steps/s" if speed else "")

    def show(self, line: Mapping[str, Any]) -> None:
        """Show the last line of the history."""
        if self._bar is None:
            return
        parts = [f"epoch {line['epoch']}", f"loss {line['loss']:.3f}"]
        for name in ("target", "source"):
            for metric, value in line.get(name, {}).items():
                if metric != "loss":
                    parts.append(f"{name} {self._show(metric, value)}")
        self._bar.update(self._task, completed=self._done, note="  ".join(parts))
