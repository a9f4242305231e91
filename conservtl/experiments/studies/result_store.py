"""Results of many runs: stored one by one, shared out over workers, continued where they stopped."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from conservtl.errors import counted
from conservtl.experiments.spec.spec import with_fields
from conservtl.experiments.studies.executors.dispatch import finish
from conservtl.experiments.studies.executors.names import PROCESSES, check_executor, is_local, workers_of
from conservtl.experiments.studies.trial import Trial, run_trial
from conservtl.report import write_json
from conservtl.storage.locks import check_folder, lock_folder

__all__ = ["ResultStore", "estimate"]


class ResultStore:
    """A folder of results, one file for each run, named by the run's key.

    Args:
        folder: the results are in ``runs`` below it.
        say: is called with lines of progress.
    """

    def __init__(self, folder: Path, say: Callable[[str], None] | None = None) -> None:
        check_folder(folder)
        self.folder = folder / "runs"
        self.say = say or (lambda _: None)

    def results(
        self, trials: Sequence[Trial], processes: int = 1, executor: str | Executor = PROCESSES
    ) -> list[dict[str, Any]]:
        """Return the result of each trial, in order; run those that have none yet.

        Trials that share data and a source model are run by one process, one after the other.

        Raises:
            SpecError: another process writes to the folder, or there is no such executor.
            LostWorkerError: a run lost its worker again and again; all others are finished.
        """
        check_executor(executor, processes)
        with lock_folder(self.folder.parent):
            return self._results(trials, processes, executor)

    def _results(self, trials: Sequence[Trial], processes: int, executor: str | Executor) -> list[dict[str, Any]]:
        distinct = {trial.key: trial for trial in trials}
        missing = [trial for trial in distinct.values() if self._read(trial) is None]
        done = len(distinct) - len(missing)
        self.say(f"{counted(len(distinct), 'run')}, {done} of them done")
        with self._sent(missing, processes, executor) as trials_to_run:
            groups: dict[str, list[Trial]] = defaultdict(list)
            for trial in trials_to_run:
                groups[trial.place].append(trial)
            for count in self._run([_Group(group, self.folder) for group in groups.values()], processes, executor):
                done += count
                self.say(f"{done} of {counted(len(distinct), 'run')}")
        return [{**(self._read(trial) or {}), "variant": trial.variant, "target": trial.target} for trial in trials]

    def _run(self, groups: Sequence[_Group], processes: int, executor: str | Executor) -> Iterable[int]:
        if not groups:
            return
        if _shares_out(processes, executor):
            yield from finish(groups, workers_of(executor, processes), self.say)
            return
        for group in groups:
            for trial in group.trials:
                _run_and_store(trial, self.folder)
                yield 1

    @contextmanager
    def _sent(self, trials: Sequence[Trial], processes: int, executor: str | Executor) -> Iterator[Sequence[Trial]]:
        """Yield trials that workers can run: a problem held in memory is written to the folder for them."""
        held = trials[0].spec.held if trials else None
        if held is None or not _shares_out(processes, executor):
            yield trials
            return
        with held.sent(self.folder.parent) as sent:
            yield [replace(trial, spec=trial.spec.holding(sent)) for trial in trials]

    def _read(self, trial: Trial) -> dict[str, Any] | None:
        """Return a stored result; None if there is none. One that is damaged is deleted, with a line of progress."""
        path = _path(trial, self.folder)
        if not path.is_file():
            return None
        try:
            result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            self.say(f"{path} is damaged and is made again")
            path.unlink(missing_ok=True)
            return None
        return result


@dataclass(frozen=True)
class _Group:
    """Trials for one worker: they share data and a source model."""

    trials: Sequence[Trial]
    folder: Path

    @property
    def name(self) -> str:
        first = self.trials[0]
        return f"run {first.key} ({first.variant}, {first.target}, seed {first.spec.seed})"

    def run(self) -> None:
        for trial in self.trials:
            _run_and_store(trial, self.folder)

    def rest(self) -> list[_Group]:
        """Return the trials without a result, each apart, so that one that ends its worker holds up no other."""
        return [_Group([trial], self.folder) for trial in self.trials if not _path(trial, self.folder).exists()]

    def __len__(self) -> int:
        return len(self.trials)


def _shares_out(processes: int, executor: str | Executor) -> bool:
    return processes > 1 or not is_local(executor)


def _path(trial: Trial, folder: Path) -> Path:
    return folder / f"{trial.key}.json"


def _run_and_store(trial: Trial, folder: Path) -> None:
    """Run a trial and write its result atomically; one that a worker given up for lost has written meanwhile stays."""
    path = _path(trial, folder)
    if path.exists():
        return
    result = run_trial(trial)
    if not path.exists():
        write_json(result, path)


def estimate(trials: Sequence[Trial], processes: int = 1) -> dict[str, Any]:
    """Return the number of runs, and their time estimated from one measured epoch.

    Returns:
        ``runs``, ``sources`` (source models that may have to be trained first), ``seconds`` without those,
        ``variants``, ``targets``.
    """
    sample = next(trial for trial in trials if trial.how == "adapt")
    short = with_fields(sample.spec, {"training.epochs": 2, "strategies": []})
    run_trial(Trial("warm-up", sample.target, short))  # reads the data, and obtains the source model
    begun = time.perf_counter()
    result = run_trial(Trial("measured", sample.target, short))
    overhead = time.perf_counter() - begun - result["seconds"]
    epoch = result["seconds"] / 2
    seconds = sum(epoch * trial.spec.training.epochs + overhead for trial in trials if trial.how != "source")
    return {
        "runs": len(trials),
        "sources": len({trial.place for trial in trials}),
        "seconds": seconds / processes,
        "variants": list(dict.fromkeys(trial.variant for trial in trials)),
        "targets": list(dict.fromkeys(trial.target for trial in trials)),
    }
