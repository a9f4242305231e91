"""Results of many runs: stored one by one, shared out over processes, continued where they stopped."""

from __future__ import annotations

import json
import multiprocessing
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from conservtl.experiments.spec.spec import with_fields
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

    def results(self, trials: Sequence[Trial], processes: int = 1) -> list[dict[str, Any]]:
        """Return the result of each trial, in order; run those that have none yet.

        Args:
            trials: those that share data and a source model are run by one process, one after the other.
            processes: number of processes.

        Raises:
            SpecError: another process writes to the folder.
        """
        with lock_folder(self.folder.parent):
            return self._results(trials, processes)

    def _results(self, trials: Sequence[Trial], processes: int) -> list[dict[str, Any]]:
        distinct = {trial.key: trial for trial in trials}
        missing = [trial for trial in distinct.values() if self._read(trial) is None]
        done = len(distinct) - len(missing)
        self.say(f"{len(distinct)} runs, {done} of them done")
        groups: dict[str, list[Trial]] = defaultdict(list)
        for trial in missing:
            groups[trial.place].append(trial)
        for count in self._run(list(groups.values()), processes):
            done += count
            self.say(f"{done} of {len(distinct)} runs")
        return [{**(self._read(trial) or {}), "variant": trial.variant, "target": trial.target} for trial in trials]

    def _run(self, groups: Sequence[list[Trial]], processes: int) -> Iterable[int]:
        if processes == 1:
            for group in groups:
                for trial in group:
                    yield _run_and_store([trial], self.folder)
            return
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(processes, mp_context=context, initializer=_one_thread) as pool:
            futures = [pool.submit(_run_and_store, group, self.folder) for group in groups]
            try:
                for future in as_completed(futures):
                    yield future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _path(self, trial: Trial) -> Path:
        return self.folder / f"{trial.key}.json"

    def _read(self, trial: Trial) -> dict[str, Any] | None:
        """Return a stored result; None if there is none, or with a line of progress if it is damaged."""
        path = self._path(trial)
        if not path.is_file():
            return None
        try:
            result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            self.say(f"{path} is damaged and is made again")
            return None
        return result


def _run_and_store(trials: Sequence[Trial], folder: Path) -> int:
    """Run trials, write each result atomically, return their number."""
    for trial in trials:
        write_json(run_trial(trial), folder / f"{trial.key}.json")
    return len(trials)


def _one_thread() -> None:
    """Use one thread: the processes share the cores."""
    torch.set_num_threads(1)


def estimate(trials: Sequence[Trial], processes: int = 1) -> dict[str, Any]:
    """Return the number of runs, and their time estimated from one measured epoch.

    Args:
        trials: the runs.
        processes: number of processes.

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
