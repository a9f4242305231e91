"""The speaker's recipe compared with baselines, all from its source model and with its augmentation.

    python benchmarks/recipe.py --fsdd RECORDINGS [--seeds 3] [--shots 5 1] [--processes 1] [--runs FOLDER]

Free spoken digits, leave one speaker out, by `conservtl compare` on examples/speech/recipe.yaml. Baselines: plain
fine-tuning at three rates, each with early stopping on a part of the shots, and at the middle rate interpolated with
the source. With one recording a word, early stopping lowers target accuracy; two rates are therefore also trained to
the end, like the recipe. Finished runs are saved, and an interrupted benchmark continues. Accuracy in percent; harmonic
means of target and source for each run; means with 95 % intervals, and paired differences of the recipe to each row
with a bootstrap interval over runs. Results: results/recipe.jsonl and recipe.md.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import platform
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from conservtl import __version__
from conservtl.experiments.spec.spec import load_spec
from conservtl.experiments.studies.bootstrap import bootstrap
from conservtl.experiments.studies.comparison import compare

HERE = Path(__file__).parent
SPEC = HERE.parent / "examples" / "speech" / "recipe.yaml"
BASELINES = ["source as it is", *(f"fine-tuning, {rate} rate" for rate in ("low", "middle", "high"))]
BASELINES += ["fine-tuning, interpolated"]
RECIPE = "recipe"
VARIANTS: dict[str, Any] = {
    f"fine-tuning to the end, {rate:g}": {"strategies": [], "training.lr": rate} for rate in (1e-4, 3e-4)
}
VARIANTS[RECIPE] = {}


def percent(estimate: dict[str, Any] | None, sign: str = "") -> str:
    """Return mean and interval."""
    if estimate is None:
        return ""
    mean, low, high = (100 * estimate[name] for name in ("mean", "low", "high"))
    return f"{mean:{sign}.1f} ({low:{sign}.1f} to {high:{sign}.1f})"


def gain(runs: list[dict[str, Any]], other: str) -> dict[str, Any] | None:
    """Return the difference of the recipe's harmonic mean to another row's, paired by speaker and seed."""
    score = {(run["variant"], run["target"], run["seed"]): run["harmonic"] for run in runs}
    pairs: dict[str, list[float]] = {}
    for variant, target, seed in score:
        if variant == RECIPE:
            pairs.setdefault(target, []).append(score[RECIPE, target, seed] - score[other, target, seed])
    return None if other == RECIPE else asdict(bootstrap(list(pairs.values())))


def table(report: dict[str, Any]) -> str:
    """Return a table for each number of shots, and the recipe's accuracy for each speaker."""
    versions = f"conservtl {__version__}, torch {torch.__version__}, python {platform.python_version()}"
    out = ["# The speaker's recipe compared with baselines\n"]
    out += [f"{platform.machine()}, CPU; {versions}; {dt.datetime.now(dt.UTC).date()}.\n"]
    out += ["Written by `benchmarks/recipe.py`, whose docstring describes the method.\n"]
    for rows in report["tables"]:
        runs = [run for run in report["runs"] if run["shots"] == rows["shots"]]
        recipe = next(row for row in rows["rows"] if row["variant"] == RECIPE)
        out += [f"## {rows['shots']} shots a class, {recipe['target']['count']} runs a row\n"]
        out += ["| | target | source | harmonic mean | the recipe is better by |", "| --- |" + " ---: |" * 4]
        for row in rows["rows"]:
            cells = [percent(row[name]) for name in ("target", "source", "harmonic")]
            cells.append(percent(gain(runs, row["variant"]), "+"))
            out.append(f"| {row['variant']} | {' | '.join(cells)} |")
        moved = ((name, one["before"]["mean"], one["after"]["mean"]) for name, one in recipe["per_target"].items())
        changes = "; ".join(f"{name} {100 * before:.1f} → {100 * after:.1f}" for name, before, after in moved)
        out += ["", f"Target, before → after the recipe: {changes}.", ""]
    return "\n".join(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fsdd", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--shots", type=int, nargs="+", default=[5, 1])
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--executor", default="processes", help="where runs are executed, as for conservtl compare")
    parser.add_argument("--runs", type=Path, default=Path(tempfile.gettempdir()) / "conservtl-recipe")
    options = parser.parse_args()
    section = {"shots": options.shots, "seeds": options.seeds, "variants": VARIANTS, "baselines": BASELINES}
    spec = load_spec(SPEC, [f"data.root={options.fsdd}", f"compare={section}"])
    where = {"processes": options.processes, "executor": options.executor}
    report = compare(spec, options.runs, **where, say=lambda text: print(text, flush=True))
    fields = ("variant", "target", "shots", "seed", "before", "after")
    lines = [json.dumps({name: run[name] for name in fields}) + "\n" for run in report["runs"]]
    (HERE / "results" / "recipe.jsonl").write_text("".join(lines), encoding="utf-8")
    (HERE / "results" / "recipe.md").write_text(table(report), encoding="utf-8")


if __name__ == "__main__":
    main()
