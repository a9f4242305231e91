"""Where the runs of a study of one's own are executed, and where their results stay."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import Executor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from conservtl.errors import SpecError
from conservtl.experiments.studies.executors.names import check_executor, check_main, is_local
from conservtl.experiments.studies.result_store import ResultStore
from conservtl.experiments.studies.trial import Trial, forget_shared
from conservtl.report import write_json

__all__ = ["Place"]


class Place:
    """This process, or workers; and the folder of results, if there is one.

    Args:
        out: the folder, or None.
        processes: number of processes of this machine.
        executor: a name, or an executor that the caller keeps.
        progress: whether to write lines of progress to stderr.

    Raises:
        SpecError: an argument is wrong, or an executor has no folder that its workers see.
    """

    def __init__(self, out: str | Path | None, processes: int, executor: str | Executor, *, progress: bool) -> None:
        if out is not None and not isinstance(out, (str, Path)):
            raise SpecError(f"out must be the path of a folder; received {type(out).__name__}. Give one, or None.")
        if isinstance(processes, bool) or not isinstance(processes, int) or processes < 1:
            raise SpecError(f"processes must be a number of processes, 1 at least; received {processes!r:.60}.")
        if not isinstance(executor, (str, Executor)):
            raise SpecError(
                "executor must be a name or a concurrent.futures.Executor; received "
                f"{type(executor).__name__}. Give an object with submit and shutdown that is a subclass of it."
            )
        check_executor(executor, processes)
        check_main()
        if out is None and not is_local(executor):
            raise SpecError(
                f"out: workers of executor {executor!r:.80} write their results to a folder that they and this process "
                "see, and there is none. Give out='FOLDER'."
            )
        self._out = None if out is None else Path(out)
        self._processes, self._executor, self._progress = processes, executor, progress

    @property
    def stores(self) -> bool:
        """Whether results are written to files."""
        return self._out is not None or self._processes > 1

    def results(self, trials: Sequence[Trial]) -> list[dict[str, Any]]:
        """Return the result of each trial, in order."""
        say = (lambda text: print(text, file=sys.stderr)) if self._progress else None  # noqa: T201
        with ExitStack() as stack:
            stack.callback(forget_shared)
            folder = self._out
            if folder is None and self.stores:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            return ResultStore(folder, say).results(trials, self._processes, self._executor)

    def kept(self, result: dict[str, Any], name: str) -> dict[str, Any]:
        """Write the result of a study to the folder, if there is one; return it."""
        if self._out is not None:
            write_json(result, self._out / f"{name}.json")
        return result
