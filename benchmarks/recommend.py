"""Comparison of the specs that `conservtl recommend` gives with the best of a list of candidates.

    python benchmarks/recommend.py [--fsdd RECORDINGS] [--cifar IMAGES --weights RESNET20] [--digits] [--seeds 1]
        [--only TEXT] [--processes 1] [--dry-run]

A case is a target and a number of shots: each speaker of free spoken digits with 1, 5 and 15 recordings a word,
CIFAR-10 under three corruptions with 5, 25 and 100 images a class (100 to 256 steps), and new digits (other labels)
with 5, 25 and 100. Each case runs the recommended spec and a fixed list of candidates on the same shots and from the
same source model. The score is the harmonic mean of target and source accuracy on the test parts, or target accuracy if
the source cannot be measured, as a mean over seeds. A case is met if the recommendation is at most one point below the
best candidate; the claim is that 80 % are met. The others are listed. Finished runs and recommendations are saved below
results/recommend, and an interrupted benchmark continues. Results: results/recommend.json and recommend.md.
"""

from __future__ import annotations

import argparse
import datetime as dt
import hashlib
import json
import platform
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from conservtl import __version__, recommend
from conservtl.experiments.spec.spec import load_spec, parse_spec, with_fields
from conservtl.experiments.studies.result_store import ResultStore
from conservtl.experiments.studies.trial import Trial
from conservtl.report import write_json
from conservtl.tasks import speech

HERE = Path(__file__).parent
EXAMPLES = HERE.parent / "examples"
RESULTS = HERE / "results"
WITHIN = 0.01
CLAIM = 0.8
RECOMMENDED = "recommended"
SHOTS = {"speech": (1, 5, 15), "corruptions": (5, 25, 100), "labels": (5, 25, 100)}
EPOCHS = {5: 50, 25: 25, 100: 8}  # of corrupted images, in batches of 32: 100, 200 and 256 steps
CORRUPTIONS = ("gaussian_noise", "gaussian_blur", "contrast")

PULL = {"kind": "l2_sp", "mode": "decoupled", "alpha": 15}
STRONG = {**PULL, "alpha": 30}
TOWARD_SOURCE = {"kind": "weight_interpolation", "t": 0.8}
# Name -> strategies and learning rate; all other fields are those of the shipped spec.
CANDIDATES: dict[str, tuple[list[dict[str, Any]], float]] = {
    "fine-tuning, 1e-4": ([], 1e-4),
    "fine-tuning, 3e-4": ([], 3e-4),
    "fine-tuning, 1e-3": ([], 1e-3),
    "fine-tuning, 3e-4, interpolated": ([TOWARD_SOURCE], 3e-4),
    "decoupled L2-SP, 15, 5e-4": ([PULL], 5e-4),
    "decoupled L2-SP, 30, 3e-4": ([STRONG], 3e-4),
    "decoupled L2-SP, 15, 1e-3, interpolated": ([PULL, TOWARD_SOURCE], 1e-3),
    "input side held, 5e-4": ([{"kind": "layer_transfer", "side": "input", "layers": 2}], 5e-4),
    "output side held, 5e-4": ([{"kind": "layer_transfer", "side": "output", "layers": 2}], 5e-4),
    "first block, 1e-3": ([{"kind": "surgical_fine_tuning", "block": "first"}], 1e-3),
    "linear probe, 1e-2": ([{"kind": "feature_extraction"}], 1e-2),
    "SVM on the last features": ([{"kind": "feature_extraction", "classifier": "svm"}], 1e-3),
}


@dataclass(frozen=True)
class Case:
    """A target and a number of shots.

    Args:
        name: name of the case.
        spec: the shipped spec with this target and number of shots.
        unfit: candidates that cannot run on it.
    """

    name: str
    spec: Any
    unfit: frozenset[str] = frozenset()


def cases(options: argparse.Namespace) -> Iterator[Case]:
    if options.fsdd is not None:
        spec = load_spec(EXAMPLES / "speech" / "fsdd.yaml", [f"data.root={options.fsdd}"])
        for speaker in speech.speakers(spec.data):
            for shots in SHOTS["speech"]:
                fields = {"data.target": speaker, "data.shots": shots}
                yield Case(f"speech, {speaker}, {shots}", with_fields(spec, fields))
    if options.cifar is not None:
        where = [f"data.root={options.cifar}", f"source.weights={options.weights}"]
        spec = load_spec(EXAMPLES / "vision" / "cifar10c.yaml", where)
        for name in CORRUPTIONS:
            for shots in SHOTS["corruptions"]:
                fields = {"data.corruption.name": name, "data.shots": shots}
                fields |= {"training.batch_size": 32, "training.epochs": EPOCHS[shots]}
                yield Case(f"CIFAR-10, {name}, {shots}", with_fields(spec, fields))
    if options.digits:
        spec = load_spec(EXAMPLES / "vision" / "spec.yaml")
        for shots in SHOTS["labels"]:
            unfit = frozenset({"output side held, 5e-4"})  # the head is new and cannot be frozen
            yield Case(f"new digits, {shots}", with_fields(spec, {"data.shots": shots}), unfit)


def recommended(spec: Any, folder: Path) -> dict[str, Any]:
    """Return the recommendation for a spec, computed once."""
    content = [spec.model_dump(mode="json"), __version__, torch.__version__]
    key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:20]
    path = folder / "recommended" / f"{key}.json"
    if not path.is_file():
        result = recommend(spec)
        write_json(
            {
                "spec": result.spec.model_dump(mode="json"),
                "reasons": [choice.reason for choice in result.choices],
                "numbers": result.numbers,
            },
            path,
        )
    stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return stored


def trials(case: Case, seeds: int, folder: Path) -> list[Trial]:
    out = []
    for seed in range(seeds):
        here = with_fields(case.spec, {"seed": seed})
        out.append(Trial(RECOMMENDED, case.name, parse_spec(recommended(here, folder)["spec"])))
        for name, (strategies, lr) in CANDIDATES.items():
            if name in case.unfit:
                continue
            out.append(Trial(name, case.name, with_fields(here, {"strategies": strategies, "training.lr": lr})))
    return out


def judged(case: Case, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the scores of the recommendation and of the best candidate."""
    scores: dict[str, list[float]] = {}
    for run in runs:
        score = run["after"]["target"] if run["harmonic"] is None else run["harmonic"]
        scores.setdefault(run["variant"], []).append(score)
    means = {name: statistics.fmean(values) for name, values in scores.items()}
    best = max((name for name in means if name != RECOMMENDED), key=means.__getitem__)
    return {
        "case": case.name,
        "recommended": means[RECOMMENDED],
        "best": best,
        "best_score": means[best],
        "met": means[RECOMMENDED] >= means[best] - WITHIN,
        "scores": means,
        "strategies": [one["kind"] for one in runs[0]["strategies"]],
    }


def table(rows: list[dict[str, Any]], seeds: int) -> str:
    met = sum(row["met"] for row in rows)
    share = met / len(rows)
    where = f"{platform.machine()}, {'GPU' if torch.cuda.is_available() else 'CPU'}; conservtl {__version__}"
    when = f"torch {torch.__version__}; {dt.datetime.now(dt.UTC).date()}; {seeds} seed{'s' * (seeds > 1)}"
    verdict = f"{share:.0%}, {'as' if share >= CLAIM else 'not as'} claimed ({CLAIM:.0%})"
    lines = [
        "# Recommended specs compared with the best candidates",
        "",
        f"{where}, {when}.",
        "",
        f"{met} of {len(rows)} cases within one point of the best of {len(CANDIDATES)} candidates: {verdict}.",
        "",
        "| case | recommended | harmonic mean (%) | best candidate | harmonic mean (%) | difference | |",
        "| --- | --- | ---: | --- | ---: | ---: | --- |",
    ]
    for row in rows:
        score, best = 100 * row["recommended"], 100 * row["best_score"]
        strategies = ", ".join(row["strategies"])
        lines.append(
            f"| {row['case']} | {strategies} | {score:.1f} | {row['best']} | {best:.1f} | {score - best:+.1f} | "
            f"{'' if row['met'] else 'missed'} |"
        )
    missed = [row["case"] for row in rows if not row["met"]]
    return "\n".join([*lines, "", f"Missed: {'; '.join(missed) or 'none'}.", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fsdd", type=Path)
    parser.add_argument("--cifar", type=Path)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--digits", action="store_true")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--executor", default="processes", help="where runs are executed, as for conservtl compare")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    if options.cifar is not None and options.weights is None:
        parser.error("--cifar needs --weights")
    selected = [case for case in cases(options) if options.only in case.name]
    if not selected:
        parser.error("no case: give --fsdd, --cifar or --digits, and an --only that is in a name")
    print(f"{len(selected)} cases, {len(selected) * options.seeds * (len(CANDIDATES) + 1)} runs", flush=True)
    if options.dry_run:
        return
    folder = options.out / "recommend"
    store, rows = ResultStore(folder, lambda text: print(text, flush=True)), []
    for case in selected:
        print(case.name, flush=True)
        planned = trials(case, options.seeds, folder)
        runs = store.results(planned, options.processes, options.executor)
        dumped = [trial.spec.model_dump(mode="json")["strategies"] for trial in planned]
        described = [{**run, "strategies": kinds} for run, kinds in zip(runs, dumped, strict=True)]
        rows.append(judged(case, described))
        write_json(
            {"cases": rows, "seeds": options.seeds, "candidates": list(CANDIDATES)}, options.out / "recommend.json"
        )
        (options.out / "recommend.md").write_text(table(rows, options.seeds), encoding="utf-8")
    print(table(rows, options.seeds))


if __name__ == "__main__":
    main()
