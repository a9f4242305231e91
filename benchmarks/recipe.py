"""The speaker's recipe beside baselines, all from the recipe's source model and with its augmentation.

    python benchmarks/recipe.py --fsdd RECORDINGS [--seeds 3] [--shots 5 1] [--processes 1] [--runs FOLDER]

Free spoken digits, leave one speaker out, by `conservtl compare` on examples/speech/recipe.yaml: plain fine-tuning at
three rates, each stopped early on a part of the shots, and at the middle rate interpolated with the source. Stopping
early on one recording a word costs the target, so that two rates are also trained to the end, as the recipe is. Runs
are kept one by one, an interrupted benchmark goes on where it stopped. Accuracy in percent; harmonic means of target
and source are taken run by run; means with 95 % intervals, and paired differences of the recipe to each row with a
bootstrap interval over runs. Results: results/recipe.jsonl and recipe.md.
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


def percent(found: dict[str, Any] | None, sign: str = "") -> str:
    """Mean and interval."""
    if found is None:
        return ""
    return f"{100 * found['mean']:{sign}.1f} ({100 * found['low']:{sign}.1f} to {100 * found['high']:{sign}.1f})"


def gain(runs: list[dict[str, Any]], other: str) -> dict[str, Any] | None:
    """The recipe's harmonic mean less another row's, each on the same speaker and seed."""
    score = {(run["variant"], run["target"], run["seed"]): run["harmonic"] for run in runs}
    pairs: dict[str, list[float]] = {}
    for variant, target, seed in score:
        if variant == RECIPE:
            pairs.setdefault(target, []).append(score[RECIPE, target, seed] - score[other, target, seed])
    return None if other == RECIPE else asdict(bootstrap(list(pairs.values())))


def table(found: dict[str, Any]) -> str:
    """One for each number of shots, and the recipe speaker by speaker."""
    versions = f"conservtl {__version__}, torch {torch.__version__}, python {platform.python_version()}"
    out = ["# The speaker's recipe beside baselines\n"]
    out += [f"{platform.machine()}, CPU; {versions}; {dt.datetime.now(dt.UTC).date()}.\n"]
    out += ["Written by `benchmarks/recipe.py`, whose docstring says what is measured.\n"]
    for rows in found["tables"]:
        runs = [run for run in found["runs"] if run["shots"] == rows["shots"]]
        own = next(row for row in rows["rows"] if row["variant"] == RECIPE)
        out += [f"## {rows['shots']} shots a class, {own['target']['count']} runs a row\n"]
        out += ["| | target | source | harmonic mean | the recipe is better by |", "| --- |" + " ---: |" * 4]
        for row in rows["rows"]:
            cells = [percent(row[name]) for name in ("target", "source", "harmonic")]
            cells.append(percent(gain(runs, row["variant"]), "+"))
            out.append(f"| {row['variant']} | {' | '.join(cells)} |")
        moved = ((name, one["before"]["mean"], one["after"]["mean"]) for name, one in own["per_target"].items())
        said = "; ".join(f"{name} {100 * before:.1f} → {100 * after:.1f}" for name, before, after in moved)
        out += ["", f"Target, before → after the recipe: {said}.", ""]
    return "\n".join(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fsdd", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--shots", type=int, nargs="+", default=[5, 1])
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--runs", type=Path, default=Path(tempfile.gettempdir()) / "conservtl-recipe")
    given = parser.parse_args()
    section = {"shots": given.shots, "seeds": given.seeds, "variants": VARIANTS, "baselines": BASELINES}
    spec = load_spec(SPEC, [f"data.root={given.fsdd}", f"compare={section}"])
    found = compare(spec, given.runs, processes=given.processes, say=lambda text: print(text, flush=True))
    kept = ("variant", "target", "shots", "seed", "before", "after")
    lines = [json.dumps({name: run[name] for name in kept}) + "\n" for run in found["runs"]]
    (HERE / "results" / "recipe.jsonl").write_text("".join(lines), encoding="utf-8")
    (HERE / "results" / "recipe.md").write_text(table(found), encoding="utf-8")


if __name__ == "__main__":
    main()
