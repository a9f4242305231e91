"""Results of many runs: stored one by one, shared out over workers, continued where they stopped."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import nullcontext
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

_RUNS = "runs"


class ResultStore:
    """Results of trials, one file for each, named by the trial's key.

    Args:
        folder: the results are in ``runs`` below it; None: they stay in memory, and this process runs the trials.
        say: is called with lines of progress.
    """

    def __init__(self, folder: Path | None, say: Callable[[str], None] | None = None) -> None:
        if folder is not None:
            check_folder(folder)
        self._folder = folder
        self._made: dict[str, dict[str, Any]] = {}
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
        with nullcontext() if self._folder is None else lock_folder(self._folder):
            distinct = {trial.key: trial for trial in trials}
            missing = [trial for trial in distinct.values() if self._read(trial) is None]
            done = len(distinct) - len(missing)
            self.say(f"{counted(len(distinct), 'run')}, {done} of them done")
            groups: dict[str, list[Trial]] = defaultdict(list)
            for trial in missing:
                groups[trial.place].append(trial)
            for count in self._run(list(groups.values()), processes, executor):
                done += count
                self.say(f"{done} of {counted(len(distinct), 'run')}")
            found = [self._read(trial) or {} for trial in trials]
        return [one | {"variant": each.variant, "target": each.target} for one, each in zip(found, trials, strict=True)]

    def _run(self, groups: Sequence[Sequence[Trial]], processes: int, executor: str | Executor) -> Iterator[int]:
        """Run groups of trials; yield the numbers of runs that are finished."""
        folder = self._folder
        if not groups:
            return
        if folder is None or (processes == 1 and is_local(executor)):
            for trial in (trial for group in groups for trial in group):
                if folder is None:
                    self._made[trial.key] = run_trial(trial)
                else:
                    _run_and_store(trial, folder / _RUNS)
                yield 1
            return
        held = groups[0][0].spec.held
        with nullcontext() if held is None else held.sent(folder) as sent:  # a problem in memory is written for workers
            if sent is not None:
                groups = [[replace(trial, spec=trial.spec.holding(sent)) for trial in group] for group in groups]
            works = [_Group(group, folder / _RUNS) for group in groups]
            yield from finish(works, workers_of(executor, processes), self.say)

    def _read(self, trial: Trial) -> dict[str, Any] | None:
        """Return a result; None if there is none. A file that is damaged is deleted, with a line of progress."""
        if self._folder is None:
            return self._made.get(trial.key)
        path = _path(trial, self._folder / _RUNS)
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


def _source_of(trial: Trial) -> str:
    """Return what the source model of a trial depends on: its place, without the choice of the target's examples."""
    place = json.loads(trial.place)
    place["data"] = {name: value for name, value in place["data"].items() if name not in ("shots", "validation")}
    return json.dumps({name: value for name, value in place.items() if name != "fresh"})


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
        "sources": len({_source_of(trial) for trial in trials if trial.trains_source}),
        "seconds": seconds / processes,
        "variants": list(dict.fromkeys(trial.variant for trial in trials)),
        "targets": list(dict.fromkeys(trial.target for trial in trials)),
    }
