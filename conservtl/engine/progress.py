"""A progress bar with the rate and both metrics."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

__all__ = ["Progress"]


class Progress:
    """Shows steps, steps a second and the last evaluation; nothing at all where it is not shown.

    Args:
        steps: steps in all, 0 where unknown.
        shown: whether to show it.
    """

    def __init__(self, steps: int, *, shown: bool) -> None:
        self._bar: Any = None
        if shown:
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
            )
            self._task = self._bar.add_task("", total=steps or None, rate="", note="")

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
        """One step more."""
        if self._bar is not None:
            task = self._bar.tasks[0]
            rate = f"{task.speed:.1f} steps/s" if task.speed else ""
            self._bar.update(self._task, advance=1, rate=rate)

    def show(self, line: Mapping[str, Any]) -> None:
        """The last line of the history."""
        if self._bar is None:
            return
        parts = [f"epoch {line['epoch']}", f"loss {line['loss']:.3f}"]
        for name in ("target", "source"):
            for metric, value in line.get(name, {}).items():
                if metric != "loss":
                    parts.append(
                        f"{name} {100 * value:.1f} %" if metric == "accuracy" else f"{name} {metric} {value:.3f}"
                    )
        self._bar.update(self._task, note="  ".join(parts))
