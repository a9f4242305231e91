"""Whether what `conservtl recommend` says is as good as the best of what one could have tried.

    python benchmarks/recommend.py [--fsdd RECORDINGS] [--cifar IMAGES --weights RESNET20] [--digits] [--seeds 1]
        [--only TEXT] [--processes 1] [--dry-run]

A case is a target and a number of shots: every speaker of free spoken digits at 1, 5 and 15 recordings a word, CIFAR-10
under three corruptions at 5, 25 and 100 images a class (for 100 to 256 steps), and new digits (other labels) at 5, 25
and 100. In each the recommended spec is run beside a fixed list of candidates, on the same shots and from the same
source model. The score is the harmonic mean of target and source accuracy on the test parts, or target accuracy where
the source cannot be measured; its mean over seeds. A case is met where the recommendation is within a point of the best
candidate or above it; the claim is that 80 % are. Misses are listed. Runs and recommendations are kept one by one below
results/recommend: an interrupted benchmark goes on where it stopped. Results: results/recommend.json and recommend.md.
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
# name -> strategies and rate; everything else is the shipped spec's.
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
        name: of both.
        spec: the shipped one, on these.
        unfit: candidates that cannot be run there.
    """

    name: str
    spec: Any
    unfit: frozenset[str] = frozenset()


def cases(given: argparse.Namespace) -> Iterator[Case]:
    if given.fsdd is not None:
        spec = load_spec(EXAMPLES / "speech" / "fsdd.yaml", [f"data.root={given.fsdd}"])
        for speaker in speech.speakers(spec.data):
            for shots in SHOTS["speech"]:
                fields = {"data.target": speaker, "data.shots": shots}
                yield Case(f"speech, {speaker}, {shots}", with_fields(spec, fields))
    if given.cifar is not None:
        where = [f"data.root={given.cifar}", f"source.weights={given.weights}"]
        spec = load_spec(EXAMPLES / "vision" / "cifar10c.yaml", where)
        for name in CORRUPTIONS:
            for shots in SHOTS["corruptions"]:
                fields = {"data.corruption.name": name, "data.shots": shots}
                fields |= {"training.batch_size": 32, "training.epochs": EPOCHS[shots]}
                yield Case(f"CIFAR-10, {name}, {shots}", with_fields(spec, fields))
    if given.digits:
        spec = load_spec(EXAMPLES / "vision" / "spec.yaml")
        for shots in SHOTS["labels"]:
            unfit = frozenset({"output side held, 5e-4"})  # the head is new: it cannot be held
            yield Case(f"new digits, {shots}", with_fields(spec, {"data.shots": shots}), unfit)


def recommended(spec: Any, folder: Path) -> dict[str, Any]:
    """The recommendation for a spec, made once."""
    said = [spec.model_dump(mode="json"), __version__, torch.__version__]
    key = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:20]
    path = folder / "recommended" / f"{key}.json"
    if not path.is_file():
        found = recommend(spec)
        write_json(
            {
                "spec": found.spec.model_dump(mode="json"),
                "reasons": [choice.reason for choice in found.choices],
                "numbers": found.numbers,
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
    """The recommendation's score beside the best candidate's."""
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


def table(found: list[dict[str, Any]], seeds: int) -> str:
    met = sum(row["met"] for row in found)
    share = met / len(found)
    where = f"{platform.machine()}, {'GPU' if torch.cuda.is_available() else 'CPU'}; conservtl {__version__}"
    when = f"torch {torch.__version__}; {dt.datetime.now(dt.UTC).date()}; {seeds} seed{'s' * (seeds > 1)}"
    verdict = f"{share:.0%}, {'as' if share >= CLAIM else 'not as'} claimed ({CLAIM:.0%})"
    lines = [
        "# Whether what is recommended is as good as the best of what one could have tried",
        "",
        f"{where}, {when}.",
        "",
        f"{met} of {len(found)} cases within a point of the best of {len(CANDIDATES)} candidates: {verdict}.",
        "",
        "| case | recommended | harmonic mean (%) | best candidate | harmonic mean (%) | difference | |",
        "| --- | --- | ---: | --- | ---: | ---: | --- |",
    ]
    for row in found:
        own, best = 100 * row["recommended"], 100 * row["best_score"]
        said = ", ".join(row["strategies"])
        lines.append(
            f"| {row['case']} | {said} | {own:.1f} | {row['best']} | {best:.1f} | {own - best:+.1f} | "
            f"{'' if row['met'] else 'missed'} |"
        )
    missed = [row["case"] for row in found if not row["met"]]
    return "\n".join([*lines, "", f"Missed: {'; '.join(missed) or 'none'}.", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fsdd", type=Path)
    parser.add_argument("--cifar", type=Path)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--digits", action="store_true")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--dry-run", action="store_true")
    given = parser.parse_args()
    if given.cifar is not None and given.weights is None:
        parser.error("--cifar needs --weights")
    wanted = [case for case in cases(given) if given.only in case.name]
    if not wanted:
        parser.error("no case: give --fsdd, --cifar or --digits, and an --only that fits one")
    print(f"{len(wanted)} cases, {len(wanted) * given.seeds * (len(CANDIDATES) + 1)} runs", flush=True)
    if given.dry_run:
        return
    folder = given.out / "recommend"
    many, found = ResultStore(folder, lambda text: print(text, flush=True)), []
    for case in wanted:
        print(case.name, flush=True)
        listed = trials(case, given.seeds, folder)
        runs = many.results(listed, given.processes)
        dumped = [trial.spec.model_dump(mode="json")["strategies"] for trial in listed]
        rows = [{**run, "strategies": said} for run, said in zip(runs, dumped, strict=True)]
        found.append(judged(case, rows))
        write_json({"cases": found, "seeds": given.seeds, "candidates": list(CANDIDATES)}, given.out / "recommend.json")
        (given.out / "recommend.md").write_text(table(found, given.seeds), encoding="utf-8")
    print(table(found, given.seeds))


if __name__ == "__main__":
    main()
