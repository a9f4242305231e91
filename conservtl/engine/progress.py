"""Progress of a run: a bar, and the experiment trackers that Accelerate knows."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from conservtl.engine.optimizer import class_name
from conservtl.engine.session import Session
from conservtl.errors import MissingExtraError, SpecError, did_you_mean

__all__ = ["Progress", "ShowMetric", "Tracker", "show_plainly", "tracking"]

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


Tracker = Any
"""Name of a tracker, such as ``"wandb"``, or an ``accelerate.tracking.GeneralTracker``."""

Tell = Callable[[Mapping[str, Any]], None]

_PROJECT = "conservtl"


@contextmanager
def tracking(
    session: Session, log: Tracker | Sequence[Tracker] | None, folder: Path | None, given: Any
) -> Iterator[Tell | None]:
    """Yield a function that sends a line of the history to the trackers of a run; None if there are none.

    ``log`` None means the trackers of the accelerator that the caller made (``given``).
    """
    accelerator = session.accelerator
    chosen = [] if log is None else [log] if isinstance(log, str) or not isinstance(log, Sequence) else list(log)
    if given is not None and chosen:
        raise SpecError(
            "log: a given accelerator says where to log. Make it with Accelerator(log_with=...), or leave one of the "
            "two out."
        )
    if chosen:
        from accelerate.utils import ProjectConfiguration

        accelerator.log_with = _known(chosen, folder)
        where = None if folder is None else str(folder)
        accelerator.project_configuration = ProjectConfiguration(project_dir=where, logging_dir=where)
    started = [] if accelerator.trackers else list(accelerator.log_with)
    if started:
        accelerator.init_trackers(_PROJECT, config=_config(session))
    try:
        yield (lambda line: _send(accelerator, line)) if accelerator.trackers else None
    finally:
        if started:
            for tracker in accelerator.trackers:
                tracker.finish()
            accelerator.trackers = []


def _known(chosen: Sequence[Tracker], folder: Path | None) -> list[Tracker]:
    """Return the trackers as Accelerate takes them."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers

    names = sorted(map(str, LOGGER_TYPE_TO_CLASS))
    available = {str(name) for name in get_available_trackers()}
    for tracker in chosen:
        if isinstance(tracker, GeneralTracker):
            continue
        if str(tracker) not in names:
            raise SpecError(
                f"log: {tracker!r} is none of {', '.join(names)}, and no GeneralTracker of Accelerate."
                f"{did_you_mean(str(tracker), names)}"
            )
        if str(tracker) not in available:
            extra = "'conservtl[tensorboard]'" if tracker == "tensorboard" else str(tracker)
            raise MissingExtraError(f"log={tracker!r} needs its package. Install it with: pip install {extra}")
        if folder is None and LOGGER_TYPE_TO_CLASS[str(tracker)].requires_logging_directory:
            raise SpecError(f"log: {tracker} writes files, so it needs a folder. Pass out=...")
    return list(chosen)


def _config(session: Session) -> dict[str, Any]:
    """Return the settings and strategies of a run as values that every tracker takes."""
    settings = {name: value for name, value in session.training.model_dump(mode="json").items() if value is not None}
    settings["optimizer"] = class_name(session.made[0])
    settings["strategies"] = ", ".join(strategy.kind for strategy in session.adaptation.origin.strategies)
    return {
        name: value if isinstance(value, (bool, int, float, str)) else str(value) for name, value in settings.items()
    }


def _send(accelerator: Any, line: Mapping[str, Any]) -> None:
    """Log the finite numbers of a line at its step, such as ``target/accuracy``."""
    accelerator.log(dict(_scalars({key: value for key, value in line.items() if key != "valid"})), step=line["step"])


def _scalars(line: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, float]]:
    for key, value in line.items():
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{above}{key}/")
        elif isinstance(value, (int, float)) and math.isfinite(value):
            yield f"{above}{key}", value
