"""Many runs: kept one by one, over processes, going on where they stopped."""

from __future__ import annotations

import json
import multiprocessing
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from conservtl.errors import SpecError
from conservtl.experiments.spec.spec import SpeechSpec, VisionSpec, parse_spec
from conservtl.experiments.studies.trial import Trial, run_trial
from conservtl.report import write_json

__all__ = ["Many", "estimate", "with_fields"]


def with_fields(spec: SpeechSpec | VisionSpec, fields: Mapping[str, Any]) -> Any:
    """The spec with other fields, by dotted name, validated.

    Raises:
        SpecError: there is no such field, or a value is wrong.
    """
    content: dict[str, Any] = spec.model_dump(mode="json")
    for dotted, value in fields.items():
        *path, last = dotted.split(".")
        at: Any = content
        for key in path:
            try:
                at = at[int(key)] if isinstance(at, list) else at[key]
            except (KeyError, IndexError, ValueError, TypeError) as error:
                raise SpecError(f"{dotted}: there is no field {key!r} in the spec. Name one that is.") from error
        at[int(last) if isinstance(at, list) else last] = value
    return parse_spec(content)


class Many:
    """A folder of results, a file a run.

    Args:
        folder: results stand in ``runs`` below it.
        say: told of progress.
    """

    def __init__(self, folder: Path, say: Callable[[str], None] | None = None) -> None:
        if folder.exists() and not folder.is_dir():
            raise SpecError(f"out: {str(folder)!r} is a file. Give a folder.")
        self.folder = folder / "runs"
        self.say = say or (lambda _: None)

    def results(self, trials: Sequence[Trial], processes: int = 1) -> list[dict[str, Any]]:
        """What came of each trial, in order; done now where it is not there yet.

        Args:
            trials: those that share data and a source model are done by one process, one after the other.
            processes: how many at the same time.
        """
        every = {trial.key: trial for trial in trials}
        missing = [trial for trial in every.values() if not self._path(trial).is_file()]
        done = len(every) - len(missing)
        self.say(f"{len(every)} runs, {done} of them done")
        groups: dict[str, list[Trial]] = defaultdict(list)
        for trial in missing:
            groups[trial.place].append(trial)
        for count in self._work(list(groups.values()), processes):
            done += count
            self.say(f"{done} of {len(every)} runs")
        return [{**self._read(trial), "variant": trial.variant, "target": trial.target} for trial in trials]

    def _work(self, groups: Sequence[list[Trial]], processes: int) -> Iterable[int]:
        if processes == 1:
            for group in groups:
                for trial in group:
                    yield _keep([trial], self.folder)
            return
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(processes, mp_context=context, initializer=_one_thread) as pool:
            futures = [pool.submit(_keep, group, self.folder) for group in groups]
            try:
                for future in as_completed(futures):
                    yield future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _path(self, trial: Trial) -> Path:
        return self.folder / f"{trial.key}.json"

    def _read(self, trial: Trial) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self._path(trial).read_text(encoding="utf-8"))
        return found


def _keep(trials: Sequence[Trial], folder: Path) -> int:
    """Do some trials and write each result, whole or not at all."""
    for trial in trials:
        write_json(run_trial(trial), folder / f"{trial.key}.json")
    return len(trials)


def _one_thread() -> None:
    """Processes share the cores."""
    torch.set_num_threads(1)


def estimate(trials: Sequence[Trial], processes: int = 1) -> dict[str, Any]:
    """The number of runs, and their time from one measured epoch of one of them.

    Args:
        trials: what would be run.
        processes: how many at the same time.

    Returns:
        ``runs``, ``sources`` (source models that may have to be trained first), ``seconds`` without those,
        ``variants``, ``targets``.
    """
    sample = next(trial for trial in trials if trial.how == "adapt")
    short = with_fields(sample.spec, {"training.epochs": 2, "strategies": []})
    run_trial(Trial("warm-up", sample.target, short))  # reads the data, and obtains the source model
    begun = time.perf_counter()
    found = run_trial(Trial("measured", sample.target, short))
    beside = time.perf_counter() - begun - found["seconds"]
    epoch = found["seconds"] / 2
    seconds = sum(epoch * trial.spec.training.epochs + beside for trial in trials if trial.how != "source")
    return {
        "runs": len(trials),
        "sources": len({trial.place for trial in trials}),
        "seconds": seconds / processes,
        "variants": list(dict.fromkeys(trial.variant for trial in trials)),
        "targets": list(dict.fromkeys(trial.target for trial in trials)),
    }
