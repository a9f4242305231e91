"""Faults tried and survived: kills at random moments, files from strangers, long runs.

``python benchmarks/faults.py`` runs the scripts in ``tests/faults`` at full length, prints a table and writes
``benchmarks/results/faults.{json,md}``. It counts; it measures no speed but how much a loop slows down over its steps.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import conservtl as ctl

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "faults"))

import hostile
import hostile_weights
import kills
import soak

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chains", type=int, default=16, help="runs that are killed five times each")
    parser.add_argument("--comparisons", type=int, default=4, help="comparisons, sweeps and searches, killed so too")
    parser.add_argument("--specs", type=int, default=10_000)
    parser.add_argument("--files", type=int, default=5_000, help="of weights")
    parser.add_argument("--steps", type=int, default=20_000, help="with each strategy")
    parser.add_argument("--adaptations", type=int, default=1_000, help="of one model with each strategy")
    parser.add_argument("--only", action="append", choices=["kills", "specs", "weights", "soak"], help="a part; repeat")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--more", action="store_true", help="add kills of another seed to those that are stored")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    seed = ["--seed", str(options.seed)]
    runs = ["--kills", "5", "--chains", str(options.chains), "--comparisons", str(options.comparisons)]
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "kills": lambda: kills.main([*seed, *runs]),
        "specs": lambda: hostile.main([*seed, "--specs", str(options.specs)]),
        "weights": lambda: hostile_weights.main([*seed, "--files", str(options.files)]),
        "soak": lambda: soak.main(["--steps", str(options.steps), "--adaptations", str(options.adaptations)]),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    stored = options.out / "faults.json"
    found: dict[str, Any] = json.loads(stored.read_text()) if stored.exists() else {}
    for name in options.only or parts:
        new, before = parts[name](), found.get(name)
        if options.more and name == "kills" and before is not None:
            new = {kind: {key: counts[key] + before[kind][key] for key in counts} for kind, counts in new.items()}
        found[name] = new
        found["machine"] = (
            f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores; python {platform.python_version()}, "
            f"torch {torch.__version__}, conservtl {ctl.__version__}; {dt.datetime.now(dt.UTC):%F}"
        )
        stored.write_text(json.dumps(found, indent=1) + "\n")
    if missing := [name for name in parts if name not in found]:
        print(f"no table yet, for {', '.join(missing)} have not run")
        return
    text = table(found)
    (options.out / "faults.md").write_text(text)
    print(text)


def table(found: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    lines = [
        "# Faults tried and survived",
        "",
        f"{found['machine']}. Made by `python benchmarks/faults.py`, from the scripts in `tests/faults`.",
        "",
        "| fault | times tried | survived | what was lost |",
        "| --- | ---: | ---: | --- |",
    ]
    killed = {
        "run": "a run, its source model in training included",
        "compare": "a comparison",
        "sweep": "a sweep",
        "tune": "a search",
    }
    for kind, what in killed.items():
        counts = found["kills"][kind]
        equal = f"{counts['equal']} of {counts['chains']} ends equal the undisturbed one bit for bit"
        lost = "steps since a checkpoint" if kind == "run" else "the run in progress"
        if kind != "run":
            equal += f"; of {counts['kept']} results that were finished {counts['changed']} changed"
        lines.append(f"| SIGKILL at a random moment of {what} | {counts['kills']} | {equal} | {lost} |")
    for kind, what in (("specs", "a spec from a stranger"), ("weights", "a file of weights from a stranger")):
        counts = found[kind]["counts"]
        good = counts.get("read", 0) + counts.get("refused", 0)
        ends = f"{good}: {counts.get('read', 0)} read, {counts.get('refused', 0)} refused in one message"
        lines.append(f"| {what} | {sum(counts.values())} | {ends} | nothing was executed |")
    told = (
        "Steps of a small network with each strategy, then adaptations of one model that are deleted. Growth counts "
        "from the second tenth of the steps, and from the eleventh adaptation. The machine had other work meanwhile."
    )
    head = "| strategy | steps | memory, KiB | open files | last tenth's step time over the second's "
    head += "| adaptations | objects | hooks |"
    lines += ["", told, "", head, "| --- |" + " ---: |" * 7]
    for name, row in sorted(found["soak"].items()):
        cells = [f"{row['steps']:,}", row["memory_kib"], row["files"], f"{row['slower']:.2f}"]
        cells += [f"{row['adaptations']:,}", row["objects"], row["hooks"]]
        lines.append(f"| {name} | {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
