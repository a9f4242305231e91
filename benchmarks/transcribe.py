"""A recognizer of digit strings adapted to one speaker: methods, baselines and a recipe, leave one speaker out.

    python benchmarks/transcribe.py --fsdd RECORDINGS [--speakers NAMES] [--seeds 2] [--shots 10 5 50] [--minutes 30]
    python benchmarks/transcribe.py --tables

Strings of three to seven free spoken digits, as examples/speech/digit_strings.yaml draws them; strings to test on are
of takes that no training string has. For each speaker a compact Conformer is trained once on the others. A seed
draws the strings to adapt with, so that all methods of a case have the same. Every adaptation runs on one thread.

The recipe is one of a few candidates. They are compared on strings of other seeds than are reported (TUNING); the one
that serves a speaker is the best for the others of the first two speakers, of those that raise the source's word error
rate by at most a point: a reported speaker's adaptation has no part in its own choice. The list of candidates and the
rule were fixed after a look at runs on the first two speakers, with strings of other seeds; only the other two are
wholly new to them. Baselines have fixed settings, plain fine-tuning three rates.

Finished runs are appended to results/transcribe.jsonl: an interrupted benchmark continues. Tables:
results/transcribe.md: word error rates in percent, mean over runs with a 95 % bootstrap interval over speakers; the
harmonic mean of 1 - WER of target and source; and the recipe's difference to each row in it, paired by speaker and
seed. Seconds are processor time.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import math
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from conservtl import __version__
from conservtl.engine import harmonic_mean
from conservtl.experiments.run.scoring import score_model
from conservtl.experiments.run.setting import Setting, prepare
from conservtl.experiments.run.source_training import SourceModel, obtain_source
from conservtl.experiments.spec.spec import load_spec, with_fields
from conservtl.experiments.studies.bootstrap import Interval, bootstrap

HERE = Path(__file__).parent
SPEC = HERE.parent / "examples" / "speech" / "digit_strings.yaml"
RUNS = HERE / "results" / "transcribe.jsonl"
SMALL = [
    "model.args={width: 64, blocks: 2, subsampling: 2, dropout: 0.05}",
    "data.strings=100",
    "data.held_out=20",
    "data.target_strings=60",
    "source.training={epochs: 14, batch_seconds: 32, lr: 3.0e-3, weight_decay: 0.01, warmup: 0.1, clip: 1.0}",
    "source.training.schedule=cosine",
    "source.training.evaluate_every=14",
]
"""A smaller network and fewer strings than the example's: an adaptation takes seconds of one core."""
TUNING = 1000
"""Seed of the strings on which candidates of the recipe are compared."""
ALLOWED = 0.01
"""Rise of the source's word error rate that a candidate may cause."""
TUNED_ON = 2
"""Speakers on whom candidates are compared."""
Method = tuple[list[dict[str, Any]], dict[str, Any]]
"""(strategies, fields of the training section)."""

KL = {"kind": "output_conservation", "rho": 0.3}
INTERPOLATION = {"kind": "weight_interpolation"}
OUTPUT_SIDE = {"kind": "layer_transfer", "side": "output", "layers": ["head", "blocks.1"]}
INPUT_SIDE = {"kind": "layer_transfer", "side": "input", "layers": ["subsampling", "blocks.0"]}
METHODS: dict[str, Method] = {
    "interpolation": ([INTERPOLATION], {}),
    "plain, rate 5e-4": ([], {"lr": 5e-4}),
    "plain, rate 2e-3": ([], {"lr": 2e-3}),
    "KL by frame": ([KL], {}),
    "output side held": ([OUTPUT_SIDE], {}),
    "L2-SP, decoupled": ([{"kind": "l2_sp", "mode": "decoupled", "alpha": 10}], {}),
    "plain, rate 1e-4": ([], {"lr": 1e-4}),
    "LHUC": ([{"kind": "lhuc"}], {"lr": 3e-2}),
    "input side held": ([INPUT_SIDE], {}),
}
"""Baselines; rate 5e-4 where none is said."""
LONG = {"lr": 1e-3, "epochs": 60}
CANDIDATES: dict[str, Method] = {
    "60 steps, interpolated at 0.5": ([{**INTERPOLATION, "t": 0.5}], LONG),
    "60 steps, interpolated at 0.4": ([{**INTERPOLATION, "t": 0.4}], LONG),
    "60 steps, output side held, interpolated at 0.5": ([OUTPUT_SIDE, {**INTERPOLATION, "t": 0.5}], LONG),
}
"""Of the recipe."""
BEFORE, RECIPE = "source as it is", "recipe"


class Bench:
    """Cases of one data folder, with a source model for each speaker.

    Args:
        root: the recordings.
        cache: folder of the source models.
        speakers: to adapt to, one after another; empty: all.
    """

    def __init__(self, root: Path, cache: Path, speakers: list[str]) -> None:
        self.base = load_spec(SPEC, [f"data.root={root}", f"source.cache={cache}", *SMALL])
        self.speakers = speakers or sorted({path.stem.split("_")[1] for path in root.glob("*.wav")})

    @lru_cache(maxsize=1)  # noqa: B019
    def source(self, speaker: str) -> tuple[Setting, SourceModel, dict[str, Any]]:
        """Return the setting without this speaker, its source model, and the scores of that."""
        setting = prepare(with_fields(self.base, {"data.target": speaker}))
        source = obtain_source(setting)
        return setting, source, scores(setting, source.model)

    def run(self, speaker: str, shots: int, seed: int, method: Method) -> dict[str, Any]:
        """Adapt once; return the scores of both domains and the seconds."""
        setting, source, _ = self.source(speaker)
        strategies, training = method
        training = {"epochs": 30, **training}
        training["epochs"] = math.ceil(training["epochs"] * min(1, 20 / shots))  # at most twice the steps of 10 strings
        fields = {f"training.{name}": value for name, value in {"evaluate_every": 1000, **training}.items()}
        given = {"data.target": speaker, "data.shots": shots, "seed": seed, "strategies": strategies, **fields}
        own = prepare(with_fields(self.base, given))
        mine = replace(own, domains=replace(setting.domains, shots=own.domains.shots))
        begun = time.process_time()
        adaptation = mine.adaptation(source.with_notes())
        mine.fit(adaptation, mine.domains.shots)
        seconds = time.process_time() - begun
        return {**scores(mine, adaptation.model), "seconds": round(seconds, 2)}


def scores(setting: Setting, model: torch.nn.Module) -> dict[str, float]:
    """Return the word error rates on both test parts."""
    tests = {"target": setting.domains.target_test, "source": setting.domains.source_test}
    return {name: score_model(setting.task, model, data).metrics["wer"] for name, data in tests.items()}


def work(speakers: list[str], shots: list[int], seeds: int) -> Iterator[tuple[str, int, int, list[str]]]:
    """Yield (speaker, shots, seed, methods): candidates first, then all at the first number of shots, then others."""
    first = speakers[:TUNED_ON]
    for speaker in first:
        yield speaker, shots[0], 0, [BEFORE]
        yield speaker, shots[0], TUNING, list(CANDIDATES)
        yield speaker, shots[0], 0, list(METHODS)
    for speaker in speakers:
        yield speaker, shots[0], 0, [BEFORE, RECIPE, *METHODS]
    for number, count in enumerate(shots):
        for seed in range(0 if number else 1, seeds):
            for speaker in speakers:
                yield speaker, count, seed, [BEFORE, RECIPE, *METHODS]


def chosen_for(speaker: str, lines: list[dict[str, Any]]) -> str:
    """Return the candidate with the best harmonic mean on the other speakers' strings for tuning.

    Of those whose source word error rate is at most ``ALLOWED`` above the source model's; where none is, the one with
    the lowest.
    """
    runs: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in lines:
        if line["seed"] == TUNING and line["speaker"] != speaker and line["method"] in CANDIDATES:
            runs[line["method"]].append(line)
    others = {line["speaker"] for found in runs.values() for line in found}
    before = statistics.fmean(
        line["source"] for line in lines if line["method"] == BEFORE and line["speaker"] in others
    )
    source = {name: statistics.fmean(run["source"] for run in found) for name, found in runs.items()}
    allowed = [name for name in runs if source[name] <= before + ALLOWED] or [min(source, key=source.__getitem__)]
    return max(allowed, key=lambda name: statistics.fmean(harmonic(run) for run in runs[name]))


def compute(bench: Bench, shots: list[int], seeds: int, minutes: float) -> None:
    """Run what is not in the results yet, until the time is over."""
    end = time.monotonic() + 60 * minutes
    lines = read()
    done = {key_of(line) for line in lines}
    for speaker, count, seed, methods in work(bench.speakers, shots, seeds):
        for method in methods:
            line: dict[str, Any] = {"speaker": speaker, "shots": count, "seed": seed, "method": method}
            if key_of(line) in done:
                continue
            if time.monotonic() > end:
                return
            if method == BEFORE:
                line |= {**bench.source(speaker)[2], "seconds": 0.0}
            elif method == RECIPE:
                line["settings"] = chosen_for(speaker, lines)
                line |= bench.run(speaker, count, seed, CANDIDATES[line["settings"]])
            else:
                line |= bench.run(speaker, count, seed, {**METHODS, **CANDIDATES}[method])
            line |= {"torch": torch.__version__, "conservtl": __version__}
            with RUNS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            lines.append(line)
            print(line, flush=True)


def key_of(line: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return the fields that identify a run."""
    return tuple(line[name] for name in ("speaker", "shots", "seed", "method"))


def read() -> list[dict[str, Any]]:
    """Return all runs so far."""
    return [json.loads(line) for line in RUNS.read_text("utf-8").splitlines()] if RUNS.is_file() else []


def harmonic(line: Mapping[str, Any]) -> float:
    """Return the harmonic mean of 1 - WER of target and source."""
    return harmonic_mean([max(0.0, 1 - line[name]) for name in ("target", "source")])


def percent(estimate: Interval, sign: str = "") -> str:
    """Return mean and interval in percent."""
    mean, low, high = (100 * value for value in (estimate.mean, estimate.low, estimate.high))
    return f"{mean:{sign}.1f} ({low:{sign}.1f} to {high:{sign}.1f})"


def grouped(values: Mapping[tuple[str, int], float]) -> Interval:
    """Return mean and bootstrap interval of (speaker, seed) -> value."""
    groups: dict[str, list[float]] = defaultdict(list)
    for (speaker, _), value in values.items():
        groups[speaker].append(value)
    return bootstrap(list(groups.values()))


def tables() -> str:
    """Return the tables of all runs."""
    lines = read()
    versions = f"conservtl {__version__}, torch {torch.__version__}, python {platform.python_version()}"
    out = ["# Digit strings: a recognizer adapted to one speaker\n"]
    out += [f"{platform.machine()}, CPU, 1 thread; {versions}; {dt.datetime.now(dt.UTC).date()}.\n"]
    out += ["Written by `benchmarks/transcribe.py`, whose docstring describes the method.\n"]
    seeds = len({line["seed"] for line in lines} - {TUNING})
    counts = " and ".join(str(count) for count in dict.fromkeys(line["shots"] for line in lines))
    out += [
        f"Measured so far: {counts} strings, {seeds} seed{'s' * (seeds > 1)}. Unlabelled strings are not measured.\n"
    ]
    for shots in dict.fromkeys(line["shots"] for line in lines):
        found: dict[str, dict[tuple[str, int], dict[str, Any]]] = defaultdict(dict)
        for line in lines:
            if line["shots"] == shots and line["seed"] != TUNING:
                found[line["method"]][line["speaker"], line["seed"]] = line
        out += table(shots, found)
    out += candidates(lines)
    return "\n".join(out) + "\n"


def table(shots: int, found: Mapping[str, Mapping[tuple[str, int], dict[str, Any]]]) -> list[str]:
    """Return the table of a number of shots, and what the recipe does for each speaker."""
    out = [f"## {shots} strings\n"]
    out += ["| | target WER | source WER | harmonic mean | the recipe is better by | s | runs |"]
    out += ["| --- |" + " ---: |" * 6]
    mine = found.get(RECIPE, {})
    for name in (one for one in (BEFORE, *METHODS, RECIPE) if one in found):
        runs = found[name]
        cells = [percent(grouped({key: run[part] for key, run in runs.items()})) for part in ("target", "source")]
        cells.append(percent(grouped({key: harmonic(run) for key, run in runs.items()})))
        pairs = {key: harmonic(mine[key]) - harmonic(run) for key, run in runs.items() if key in mine}
        cells.append("" if name == RECIPE or not pairs else percent(grouped(pairs), "+"))
        cells += [f"{statistics.median(run['seconds'] for run in runs.values()):.1f}", str(len(runs))]
        out.append(f"| {name} | {' | '.join(cells)} |")
    out.append("")
    pairs_of = [(found[BEFORE][key], run) for key, run in mine.items() if key in found.get(BEFORE, {})]
    if pairs_of:
        target, source = [
            [statistics.fmean(run[part] for run in side) for side in zip(*pairs_of, strict=True)] for part in PARTS
        ]
        ratio, more = target[1] / target[0], 100 * (source[1] - source[0])
        out.append(f"Target WER after the recipe: {ratio:.2f} of the source model's; source WER {more:+.1f} points.\n")
        out += [
            "| speaker, before → after | target | source | the settings chosen on the others |",
            "| --- | ---: | ---: | --- |",
        ]
        for speaker in dict.fromkeys(run["speaker"] for _, run in pairs_of):
            own = [pair for pair in pairs_of if pair[1]["speaker"] == speaker]
            sides = list(zip(*own, strict=True))
            cells = [
                " → ".join(f"{100 * statistics.fmean(run[part] for run in side):.1f}" for side in sides)
                for part in PARTS
            ]
            out.append(f"| {speaker} | {' | '.join(cells)} | {own[0][1]['settings']} |")
        out.append("")
    return out


PARTS = ("target", "source")


def candidates(lines: list[dict[str, Any]]) -> list[str]:
    """Return the table of the recipe's candidates on the strings for tuning."""
    out = ["## Candidates of the recipe, on strings that are not reported\n"]
    out += ["| | target WER | source WER | harmonic mean | runs |", "| --- |" + " ---: |" * 4]
    for name in CANDIDATES:
        runs = {(line["speaker"], 0): line for line in lines if line["seed"] == TUNING and line["method"] == name}
        if runs:
            cells = [percent(grouped({key: run[part] for key, run in runs.items()})) for part in PARTS]
            cells.append(percent(grouped({key: harmonic(run) for key, run in runs.items()})))
            out.append(f"| {name} | {' | '.join(cells)} | {len(runs)} |")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fsdd", type=Path)
    parser.add_argument("--cache", type=Path, help="folder of the source models; none: the usual one")
    parser.add_argument("--speakers", nargs="+", default=[])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--shots", type=int, nargs="+", default=[10, 5, 50])
    parser.add_argument("--minutes", type=float, default=600.0, help="start no run after so many")
    parser.add_argument("--tables", action="store_true", help="write the tables only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.tables:
        bench = Bench(options.fsdd, options.cache, options.speakers)
        compute(bench, options.shots, options.seeds, options.minutes)
    (HERE / "results" / "transcribe.md").write_text(tables(), encoding="utf-8")


if __name__ == "__main__":
    main()
