"""Runs and studies that are killed at random moments and resumed, beside one that nobody touches.

Each run is a process forked from this one, in which everything is imported already. ``python tests/faults/kills.py
--chains 2 --seed 0`` prints a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna  # noqa: F401 - here, so that it is not imported by each process
import torch
from safetensors.torch import load_file

from conservtl import plugins
from conservtl.experiments.run.runner import run
from conservtl.experiments.spec.spec import load_spec, read_content
from conservtl.experiments.studies.comparison import compare
from conservtl.experiments.studies.layer_sweep import sweep
from conservtl.experiments.studies.study_storage import opened_storage
from conservtl.experiments.studies.tuning import tune

TASK = Path(__file__).parents[2] / "examples" / "extend" / "toy_task"
QUICK = ("source.training.epochs=25", "training.epochs=50", "data.source_hums=256", "training.evaluate_every=1")
COMPARED = ("source.training.epochs=4", "training.epochs=5", "data.source_hums=64")


def start(job: Callable[[], Any], output: Path) -> int:
    """Run a job in a new process; its output goes to a file."""
    sys.stdout.flush()
    if child := os.fork():
        return child
    code = 1
    try:
        handle = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        job()
        code = 0
    except BaseException as error:  # noqa: BLE001 - reported by the exit code
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        code = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1
    finally:
        sys.stderr.flush()
        os._exit(code)


def end_of(child: int) -> int:
    """Wait for a process; return its exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def chain(
    job: Callable[[bool], Any],
    seconds: float,
    kills: int,
    chance: random.Random,
    output: Path,
    after: Callable[[], Any] = lambda: None,
) -> int:
    """Kill a job at random moments, resume it each time, and let the last one end; return the kills that came in time.

    Args:
        job: takes whether to resume.
        seconds: time that the job takes undisturbed; kills are spread evenly over it.
        kills: number of kills.
        chance: the moments are drawn from it.
        output: file for the output of all of them.
        after: is called after each of them.
    """
    hit = 0
    for number in range(kills):
        child = start(lambda: job(number > 0), output)  # noqa: B023 - called at once
        time.sleep(chance.uniform(0, seconds))
        os.kill(child, signal.SIGKILL)
        code = end_of(child)
        hit += code == -signal.SIGKILL
        if code not in (0, -signal.SIGKILL):
            raise RuntimeError(f"the process failed before it was killed: {output.read_text()[-2000:]}")
        after()
    if code := end_of(start(lambda: job(True), output)):
        raise RuntimeError(f"resuming failed with {code}: {output.read_text()[-2000:]}")
    after()
    return hit


def same(one: Path, other: Path) -> bool:
    """Whether two files of tensors are equal bit for bit."""
    first, second = load_file(one), load_file(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def killed_runs(folder: Path, chains: int, kills: int, chance: random.Random) -> dict[str, int]:
    """Kill runs: while the source model trains, in a step, in a checkpoint, in a report."""
    counts = {"kills": 0, "chains": 0, "equal": 0}
    for number in range(chains + 1):  # the first is not disturbed
        place = folder / f"run-{number}"
        spec = load_spec(TASK / "spec.yaml", [*QUICK, f"source.cache={place}/cache"])

        def job(resume: bool, spec: Any = spec, place: Path = place) -> None:
            run(spec, place / "out", resume=resume and (place / "out").is_dir())

        place.mkdir()
        if number == 0:
            begun = time.perf_counter()
            if end_of(start(lambda: job(False), place / "output")):
                raise RuntimeError((place / "output").read_text()[-2000:])
            seconds = time.perf_counter() - begun
            continue
        counts["kills"] += chain(job, seconds, kills, chance, place / "output")
        counts["chains"] += 1
        whole, out = folder / "run-0" / "out", place / "out"
        files = [{path.name for path in each.iterdir()} for each in (whole, out)]
        counts["equal"] += files[0] == files[1] and same(whole / "model.safetensors", out / "model.safetensors")
    return counts


def compared(place: Path) -> Any:
    """Run a comparison; return its figures."""
    section = "compare={targets: [slow clock], seeds: 2, baselines: [source as it is]}"
    spec = load_spec(TASK / "spec.yaml", [*COMPARED, section, f"source.cache={place}/cache"])
    return _figures(compare(spec, place / "out"))


def swept(place: Path) -> Any:
    """Run a sweep; return its figures."""
    section = (
        "sweep={targets: [slow clock], seeds: 1, layers: [0, 1], sides: [input], controls: false, strengths: [1.0]}"
    )
    spec = load_spec(TASK / "spec.yaml", [*COMPARED, section, f"source.cache={place}/cache"])
    return _figures(sweep(spec, place / "out"))


def searched(place: Path) -> Any:
    """Run a search; return its trials, without the rates that it has drawn."""
    marks = [
        "training.lr={range: [1.0e-5, 1.0e-3], log: true}",
        "data.validation=0.4",
        "tune={trials: 4, prune: false}",
    ]
    content = read_content(TASK / "spec.yaml", [*COMPARED, *marks, f"source.cache={place}/cache"])
    return [{key: trial[key] for key in ("number", "state")} for trial in tune(content, place / "out")["trials"]]


def _figures(result: dict[str, Any]) -> Any:
    return [{key: value for key, value in one.items() if key != "seconds"} for one in result["runs"]]


def stored(out: Path) -> dict[str, Any]:
    """Return all results of a study that are finished, as they are stored."""
    found: dict[str, Any] = {path.name: path.read_text() for path in (out / "runs").glob("*.json")}
    if (out / "study.db").is_file():
        with opened_storage(f"sqlite:///{out / 'study.db'}") as storage:
            for study in storage.get_all_studies():
                trials = storage.get_all_trials(study._study_id)
                found |= {str(trial.number): repr(trial) for trial in trials if trial.state.is_finished()}
    return found


def killed_studies(
    name: str, job: Callable[[Path], Any], folder: Path, chains: int, kills: int, chance: random.Random
) -> dict[str, int]:
    """Kill studies: results that are finished stay as they are, and the figures equal those of an undisturbed one."""
    counts = {"kills": 0, "chains": 0, "equal": 0, "kept": 0, "changed": 0}
    whole: Any = None
    for number in range(chains + 1):
        place = folder / f"{name}-{number}"
        place.mkdir()
        before: dict[str, Any] = {}

        def do(_: bool, place: Path = place) -> None:
            (place / "figures.json").write_text(json.dumps(job(place)))

        def look(place: Path = place, before: dict[str, Any] = before) -> None:
            after = stored(place / "out")
            counts["kept"] += len(before)
            counts["changed"] += sum(after.get(key) != value for key, value in before.items())
            before.update(after)

        if number == 0:
            begun = time.perf_counter()
            if end_of(start(lambda: do(False), place / "output")):
                raise RuntimeError((place / "output").read_text()[-2000:])
            seconds = time.perf_counter() - begun
            whole = json.loads((place / "figures.json").read_text())
            continue
        counts["kills"] += chain(do, seconds, kills, chance, place / "output", look)
        counts["chains"] += 1
        counts["equal"] += json.loads((place / "figures.json").read_text()) == whole
    return counts


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Kill runs and studies; return what was counted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chains", type=int, default=2)
    parser.add_argument("--comparisons", type=int, default=1, help="and sweeps, and searches")
    parser.add_argument("--kills", type=int, default=3, help="in each chain")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # forked processes cannot use the threads of their parent
    plugins.import_modules([str(TASK)])
    chance = random.Random(options.seed)
    folder = Path(tempfile.mkdtemp())
    try:
        return {
            "run": killed_runs(folder, options.chains, options.kills, chance),
            **{
                name: killed_studies(name, job, folder, options.comparisons, options.kills, chance)
                for name, job in (("compare", compared), ("sweep", swept), ("tune", searched))
            },
        }
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    print(json.dumps(main()))  # noqa: T201 - a script
