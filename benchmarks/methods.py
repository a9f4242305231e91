"""Each method with its default settings, and the recipe for images, compared with plain fine-tuning and baselines.

    python benchmarks/methods.py --fsdd RECORDINGS [--seeds 5] [--shots 1 5]
    python benchmarks/methods.py --cifar IMAGES --weights RESNET20 [--seeds 5] [--corruptions ...]
    python benchmarks/methods.py --tables

Free spoken digits, leave one speaker out; CIFAR-10 under corruptions. All methods have the same source model, the same
shots and the training settings of `fsdd.yaml` and `cifar10c.yaml`, except for the learning rate that a method's
docstring recommends. On images, the 200 steps of the spec use batches of 32 instead of 64, which halves the time. The
recipe has its own spec, `recipe.yaml`. Finished runs are saved in results/methods.jsonl: an interrupted benchmark
continues, and several processes share the work (`--part 0/2`, `--part 1/2`). Tables: results/methods.md.

Columns: target and source accuracy after the adaptation and their harmonic mean, in percent, mean ± half the 95 %
interval over runs (Student's t); the constrained score of Mantena et al. 2022 (arXiv 2210.03255): the share of the
target's errors that is corrected, times the unused share of an allowed source degradation of 3 points, mean over
targets; and the difference of the harmonic mean to the best plain rate, paired by speaker (or corruption), shots and
seed. The recipe is compared with the best baseline for each target: on images also plain fine-tuning with updated
norms, the first or the last block alone, and interpolation.
Seconds are the median wall-clock time of a run, under whatever load the machine had, and no claim about speed.
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
from pathlib import Path
from typing import Any

import torch

from conservtl import __version__, recipe
from conservtl.engine import harmonic_mean
from conservtl.experiments.run.scoring import score_model
from conservtl.experiments.run.setting import Setting, prepare
from conservtl.experiments.run.source_training import obtain_source
from conservtl.experiments.spec.spec import load_spec

HERE = Path(__file__).parent
EXAMPLES = HERE.parent / "examples"
RUNS = HERE / "results" / "methods.jsonl"
HALF = ["training.batch_size=32", "training.epochs=25", "training.evaluate_every=25"]
Runs = dict[tuple[str, int], dict[str, Any]]
"""(target, seed) -> run."""
KAPPA = 3.0  # source degradation in points at which the constrained score is 0

# Name in the table -> overrides of the spec.
RECIPE = "recipe"
METHODS: dict[str, list[str]] = {
    "plain, rate 1e-4": ["strategies=[]", "training.lr=1.0e-4"],
    "plain, rate 5e-4": ["strategies=[]", "training.lr=5.0e-4"],
    "plain, rate 2e-3": ["strategies=[]", "training.lr=2.0e-3"],
    "plain, early stopping": [
        "strategies=[]",
        "data.validation=0.4",
        "training={keep: target, patience: 5, evaluate_every: 5}",
    ],
    "WeightInterpolation": ["strategies=[{kind: wise_ft}]"],
    "L2SP, coupled": ["strategies=[{kind: l2sp}]"],
    "L2SP, decoupled": ["strategies=[{kind: l2sp, mode: decoupled}]"],
    "FisherSP": ["strategies=[{kind: fisher_sp}]"],
    "FisherSP, source data": ["strategies=[{kind: ewc}]"],
    "L1SP": ["strategies=[{kind: l1_sp}]"],
    "GroupLassoSP": ["strategies=[{kind: group_lasso_sp}]"],
    "Projection": ["strategies=[{kind: projection}]"],
    "SelectiveDecay": ["strategies=[{kind: spd}]"],
    "Mixout": ["strategies=[{kind: mixout}]"],
    "OutputConservation, rho": ["strategies=[{kind: kld}]"],
    "OutputConservation, weight (LwF)": ["strategies=[{kind: lwf}]"],
    "FisherSP with OutputConservation": ["strategies=[{kind: fisher_sp}, {kind: kld}]"],
    "FeatureConservation, DELTA": ["strategies=[{kind: delta}]"],
    "FeatureConservation, LDIFS": ["strategies=[{kind: feature_conservation, metric: ldifs}]"],
    "SpectralShrinkage": ["strategies=[{kind: bss}]"],
    "LPFT": ["strategies=[{kind: lp_ft}]"],
    "AutoRGN": ["strategies=[{kind: auto_rgn}]"],
    "SurgicalFineTuning, first block": ["strategies=[{kind: surgical_fine_tuning}]"],
    "NormAdaptation": ["strategies=[{kind: norm_adaptation}]", "training.lr=1.0e-2"],
    "LHUC": ["strategies=[{kind: lhuc}]", "training.lr=3.0e-2"],
    "InputTransform": ["strategies=[{kind: input_transform}]", "training.lr=3.0e-3"],
}
_REST = "{kind: l2_sp, mode: decoupled, alpha: 15}, {kind: weight_interpolation, t: 0.75}"
_NORMS = "{kind: norm_adaptation, train: all, statistics: instance, prior: 5}"
PARTS = {
    "recipe, norms of the source": [f"strategies=[{_REST}]", "training.lr=2.0e-3", "data.augment=true"],
    "recipe, images flipped but not shifted": [f"strategies=[{_NORMS}, {_REST}]", "training.lr=2.0e-3"],
}
VISION: dict[str, list[str]] = {
    RECIPE: [],
    **PARTS,
    "plain, rate 1e-4, norms follow": [*METHODS["plain, rate 1e-4"], "training.batch_norm=train"],
    "plain, rate 5e-4, norms follow": [*METHODS["plain, rate 5e-4"], "training.batch_norm=train"],
    "plain, rate 2e-3, norms follow": [*METHODS["plain, rate 2e-3"], "training.batch_norm=train"],
    "first block alone, rate 1e-3": [
        "strategies=[{kind: surgical_fine_tuning, block: 'layer1.*'}]",
        "training.lr=1.0e-3",
    ],
    "last block alone, rate 1e-3": [
        "strategies=[{kind: surgical_fine_tuning, block: 'layer3.*'}]",
        "training.lr=1.0e-3",
    ],
    "rate 1e-3, norms follow, interpolated": [
        "strategies=[{kind: wise_ft}]",
        "training.lr=1.0e-3",
        "training.batch_norm=train",
    ],
    "plain, rate 5e-4, the recipe's augmentation": [*METHODS["plain, rate 5e-4"], "data.augment=true"],
    "plain, rate 2e-3, the recipe's augmentation": [*METHODS["plain, rate 2e-3"], "data.augment=true"],
}
"""Methods on images only. A block is a stage of the network. recipe.py measures the speaker's recipe, which has another
source model."""
_STRONG = json.dumps(recipe("speaker").augment)
SPEECH: dict[str, list[str]] = {
    "plain, rate 1e-4, the recipe's augmentation": [*METHODS["plain, rate 1e-4"], f"data.augment={_STRONG}"],
    "plain, rate 5e-4, the recipe's augmentation": [*METHODS["plain, rate 5e-4"], f"data.augment={_STRONG}"],
}
"""Methods on speech only."""
PLAIN = [name for name in METHODS if name.startswith("plain, rate")]
AUGMENTED = [name for name in {**VISION, **SPEECH} if name.endswith("augmentation")]
BASELINES = [*PLAIN, "WeightInterpolation", *(name for name in VISION if name not in [*AUGMENTED, *PARTS, RECIPE])]
"""Baselines of the recipe."""


def speech_cases(root: Path, shots: list[int], seeds: int) -> Iterator[tuple[Path, dict[str, Any], list[str]]]:
    """Yield (spec, fields that identify the run, overrides), with the runs of one source model together."""
    speakers = sorted({path.stem.split("_")[1] for path in root.glob("*.wav")})
    for number in shots:
        for seed in range(seeds):
            for speaker in speakers:
                where = {"task": "speech", "target": speaker, "shots": number, "seed": seed}
                given = [f"data.root={root}", f"data.target={speaker}", f"data.shots={number}", f"seed={seed}"]
                yield EXAMPLES / "speech" / "fsdd.yaml", where, given


def vision_cases(
    root: Path, weights: Path, corruptions: list[str], seeds: int
) -> Iterator[tuple[Path, dict[str, Any], list[str]]]:
    """Yield the same for images."""
    for seed in range(seeds):
        for name in corruptions:
            where = {"task": "vision", "target": name, "shots": 25, "seed": seed}
            given = [f"data.root={root}", f"source.weights={weights}", f"data.corruption.name={name}", f"seed={seed}"]
            yield EXAMPLES / "vision" / "cifar10c.yaml", where, given


def measure(setting: Setting, source: Any, before: Mapping[str, float]) -> dict[str, float]:
    """Adapt as the setting's spec says; return the accuracies on both test parts before and after, and the seconds."""
    begun = time.perf_counter()
    domains, spec = setting.domains, setting.spec
    adaptation = setting.adaptation(source.model)
    training = spec.training.model_copy(
        update={} if domains.validation is not None else {"evaluate_every": spec.training.epochs}
    )
    valid = {"target": domains.validation} if domains.validation is not None else None
    setting.fit(adaptation, domains.shots, valid, training)
    seconds = time.perf_counter() - begun
    return {**before, **accuracies(setting, adaptation.model, "after"), "seconds": seconds}


def accuracies(setting: Setting, model: torch.nn.Module, when: str) -> dict[str, float]:
    """Return the accuracies on both test parts, in percent."""
    tests = {"target": setting.domains.target_test, "source": setting.domains.source_test}
    scores = {name: score_model(setting.task, model, data) for name, data in tests.items()}
    return {f"{name} {when}": 100 * found.metrics["accuracy"] for name, found in scores.items()}


def compute(cases: Iterator[tuple[Path, dict[str, Any], list[str]]], part: tuple[int, int], only: list[str]) -> None:
    """Run the cases that are not in the results yet."""
    done = {key_of(line) for line in read()}
    for number, (path, where, given) in enumerate(cases):
        if number % part[1] != part[0]:
            continue
        source, before, shared = None, {}, None
        for method, overrides in {**METHODS, **(SPEECH if where["task"] == "speech" else VISION)}.items():
            line = {**where, "method": method}
            if key_of(line) in done or (only and method not in only):
                continue
            fields = [text for text in overrides if not text.startswith("training={")]
            fields += [f"training.{k}={v}" for text in overrides for k, v in parts_of(text)]
            if method == RECIPE:
                spec = load_spec(path.with_name("recipe.yaml"), given)
            else:
                spec = load_spec(path, [*given, *(HALF if where["task"] == "vision" else ()), *fields])
            if spec.data.validation * spec.data.shots >= 1 or spec.data.validation == 0:
                setting = prepare(spec)
            else:
                continue  # one recording a word cannot be split
            if source is None:
                source = obtain_source(setting)
                before = accuracies(setting, source.model, "before")
                shared = setting.domains
            if setting.domains.validation is None:
                augment = setting.domains.augmentation
                setting = Setting(spec, replace(shared, augmentation=augment), setting.example, setting.shared)
            line |= measure(setting, source, before)
            with RUNS.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print({k: round(v, 1) if isinstance(v, float) else v for k, v in line.items()}, flush=True)


def parts_of(text: str) -> list[tuple[str, str]]:
    """Return the fields of ``training={a: b, c: d}``, so that the spec's other fields stay."""
    if not text.startswith("training={"):
        return []
    return [tuple(field.split(": ")) for field in text[len("training={") : -1].split(", ")]  # type: ignore[misc]


def key_of(line: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return the fields that identify a run."""
    return tuple(line[name] for name in ("task", "target", "shots", "seed", "method"))


def read() -> list[dict[str, Any]]:
    """Return all runs so far."""
    return [json.loads(line) for line in RUNS.read_text().splitlines()] if RUNS.is_file() else []


def harmonic(run: Mapping[str, Any]) -> float:
    """Return the harmonic mean of target and source accuracy after the adaptation, in percent."""
    return 100 * harmonic_mean([run["target after"] / 100, run["source after"] / 100])


def constrained(runs: list[dict[str, Any]]) -> float:
    """Return the mean over targets of max(0, kappa - degradation) / kappa * share of the target's corrected errors."""
    by_target: dict[str, list[float]] = defaultdict(list)
    for run in runs:
        unused = max(0.0, KAPPA - max(0.0, run["source before"] - run["source after"])) / KAPPA
        corrected = (run["target after"] - run["target before"]) / max(1e-9, 100 - run["target before"])
        by_target[run["target"]].append(unused * corrected)
    return statistics.mean(statistics.mean(values) for values in by_target.values())


def interval(values: list[float]) -> str:
    """Return mean ± half the 95 % interval of the mean."""
    if len(values) < 2:
        return f"{values[0]:.1f}"
    return f"{statistics.mean(values):.1f} ± {student(len(values) - 1) * sem(values):.1f}"


def sem(values: list[float]) -> float:
    """Return the standard error of the mean."""
    return statistics.stdev(values) / math.sqrt(len(values))


def student(freedom: int) -> float:
    """Return the 97.5 % quantile of Student's t, by bisection of its distribution function."""

    def above(t: float) -> float:
        steps = 2000
        norm = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
        width = t / steps
        density = [norm * (1 + (i * width) ** 2 / freedom) ** (-(freedom + 1) / 2) for i in range(steps + 1)]
        return 0.5 - width * (sum(density) - (density[0] + density[-1]) / 2)

    low, high = 0.0, 30.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if above(middle) > 0.025 else (low, middle)
    return low


def tables() -> str:
    """Return the tables of all runs."""
    groups: dict[tuple[str, int], dict[str, Runs]] = defaultdict(dict)
    for run in read():
        runs_of = groups[run["task"], run["shots"]].setdefault(run["method"], {})
        runs_of[run["target"], run["seed"]] = run
    versions = {"conservtl": __version__, "torch": torch.__version__, "python": platform.python_version()}
    date = dt.datetime.now(tz=dt.UTC).date().isoformat()
    machine = f"{platform.machine()}, CPU, 1 thread; {', '.join(f'{n} {v}' for n, v in versions.items())}; {date}."
    out = ["# Each method with its default settings\n", machine]
    out += ["Written by `benchmarks/methods.py`, whose docstring describes the columns.\n"]
    out += [*summary(groups), ""]
    for (task, shots), methods in sorted(groups.items()):
        best = best_plain(methods)
        targets = sorted({run["target"] for runs in methods.values() for run in runs.values()})
        seeds = len({run["seed"] for runs in methods.values() for run in runs.values()})
        first = next(iter(methods.values())).values()
        before = {name: statistics.mean(run[f"{name} before"] for run in first) for name in ("target", "source")}
        note = f"Before: target {before['target']:.1f}, source {before['source']:.1f}. Differences are to `{best}`."
        out += [
            f"## {task}, {shots} shot{'s' * (shots > 1)} a class\n",
            f"{', '.join(targets)}; {seeds} seeds. {note}\n",
        ]
        out += ["| method | target | source | harmonic mean | constrained score | difference | seconds | runs |"]
        out += ["| --- |" + " ---: |" * 7]
        for name in (name for name in {**METHODS, **VISION, **SPEECH} if name in methods):
            runs = methods[name]
            pairs = differences(runs, methods[best])
            columns = [
                interval([run["target after"] for run in runs.values()]),
                interval([run["source after"] for run in runs.values()]),
                interval([harmonic(run) for run in runs.values()]),
                f"{constrained(list(runs.values())):.2f}",
                "" if name == best or not pairs else interval(pairs),
                f"{statistics.median(run['seconds'] for run in runs.values()):.1f}",
                str(len(runs)),
            ]
            out.append(f"| {name} | {' | '.join(columns)} |")
        out += ["", *recipe_rows(methods, targets), ""]
    return "\n".join(out)


def best_plain(methods: Mapping[str, Runs]) -> str:
    """Return the plain rate with the best harmonic mean."""
    names = [name for name in PLAIN if name in methods]
    return max(names, key=lambda name: statistics.mean(harmonic(run) for run in methods[name].values()))


def differences(runs: Runs, others: Runs) -> list[float]:
    """Return the differences of harmonic means, paired by target and seed."""
    return [harmonic(run) - harmonic(others[key]) for key, run in runs.items() if key in others]


def summary(groups: Mapping[tuple[str, int], Mapping[str, Runs]]) -> list[str]:
    """Return one row for each method: its difference to the best plain rate in each protocol."""
    protocols = sorted(groups)
    out = [
        "| difference to the best plain rate | "
        + " | ".join(f"{t}, {n} shot{'s' * (n > 1)} a class" for t, n in protocols)
        + " |"
    ]
    out += ["| --- |" + " ---: |" * len(protocols)]
    for name in METHODS:
        cells = []
        for protocol in protocols:
            methods = groups[protocol]
            best = best_plain(methods)
            pairs = differences(methods[name], methods[best]) if name in methods else []
            cells.append("best plain rate" if name == best else interval(pairs) if pairs else "")
        out.append(f"| {name} | {' | '.join(cells)} |")
    return out


def recipe_rows(methods: Mapping[str, Runs], targets: list[str]) -> list[str]:
    """Return the rows of the recipe and the best baseline, for each target and for all."""
    if RECIPE not in methods:
        return []
    out = ["| the recipe on | target | source | harmonic mean | best baseline | its harmonic mean | difference |"]
    out += ["| --- | ---: | ---: | ---: | --- | ---: | ---: |"]
    for name, chosen in [*((target, [target]) for target in targets), ("all", targets)]:
        runs = {key: run for key, run in methods[RECIPE].items() if key[0] in chosen}
        others = {b: [methods[b][key] for key in runs if key in methods[b]] for b in BASELINES if b in methods}
        whole = {b: [harmonic(run) for run in found] for b, found in others.items() if len(found) == len(runs)}
        if not runs or not whole:
            continue
        best = max(whole, key=lambda b: statistics.mean(whole[b]))
        pairs = [harmonic(run) - other for run, other in zip(runs.values(), whole[best], strict=True)]
        columns = [interval([run[f"{domain} after"] for run in runs.values()]) for domain in ("target", "source")]
        columns += [interval([harmonic(run) for run in runs.values()]), best, interval(whole[best]), interval(pairs)]
        out.append(f"| {name} | {' | '.join(columns)} |")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("fsdd", "cifar", "weights"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--shots", type=int, nargs="+", default=[5, 1])
    parser.add_argument("--only", nargs="+", default=[], help="methods by name")
    parser.add_argument("--part", default="0/1", help="share of the cases for this process")
    parser.add_argument("--tables", action="store_true", help="write the tables only")
    parser.add_argument(
        "--corruptions",
        nargs="+",
        default=["gaussian_noise", "gaussian_blur", "defocus_blur", "contrast", "brightness"],
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    number, of = options.part.split("/")
    if not options.tables and options.fsdd is not None:
        compute(speech_cases(options.fsdd, options.shots, options.seeds), (int(number), int(of)), options.only)
    if not options.tables and options.cifar is not None:
        cases = vision_cases(options.cifar, options.weights, options.corruptions, options.seeds)
        compute(cases, (int(number), int(of)), options.only)
    (HERE / "results" / "methods.md").write_text(tables())


if __name__ == "__main__":
    main()
