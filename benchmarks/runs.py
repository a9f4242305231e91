"""Target and source accuracy of the shipped specs, before and after, and of freezing either side.

    python benchmarks/runs.py --fsdd RECORDINGS --cifar IMAGES --weights RESNET20 [--seeds 3]

Each speaker is the target once, with a source model trained on all others. Numbers are means over speakers and seeds,
with standard deviations. Results: results/runs.json and runs.md.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import platform
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from conservtl import __version__
from conservtl.experiments.run.runner import run
from conservtl.experiments.spec.spec import load_spec

HERE = Path(__file__).parent
EXAMPLES = HERE.parent / "examples"


def frozen(side: str) -> str:
    """Return the override that freezes two layers of one side."""
    return f"strategies=[{{kind: layer_transfer, side: {side}, layers: 2}}]"


def cases(fsdd: Path | None, cifar: Path | None, weights: Path | None) -> dict[str, list[tuple[Path, list[str]]]]:
    """Return row of the table -> its runs, as specs and overrides."""
    out: dict[str, list[tuple[Path, list[str]]]] = {}
    if fsdd is not None:
        spec = EXAMPLES / "speech" / "fsdd.yaml"
        speakers = sorted({path.stem.split("_")[1] for path in fsdd.glob("*.wav")})
        targets = [[f"data.root={fsdd}", f"data.target={speaker}"] for speaker in speakers]
        for target, speaker in zip(targets, speakers, strict=True):
            out[f"speech, fsdd.yaml, {speaker}"] = [(spec, target)]
        out["speech, fsdd.yaml, all"] = [(spec, target) for target in targets]
        out["speech, output side held (2 layers)"] = [(spec, [*target, frozen("output")]) for target in targets]
        out["speech, input side held (2 layers)"] = [(spec, [*target, frozen("input")]) for target in targets]
        out["speech, plain fine-tuning"] = [(spec, [*target, "strategies=[]"]) for target in targets]
    if cifar is not None and weights is not None:
        spec = EXAMPLES / "vision" / "cifar10c.yaml"
        overrides = [f"data.root={cifar}", f"source.weights={weights}"]
        for name in ("gaussian_noise", "gaussian_blur", "contrast"):
            out[f"vision, cifar10c.yaml, {name}"] = [(spec, [*overrides, f"data.corruption.name={name}"])]
    digits = EXAMPLES / "vision" / "spec.yaml"
    out["vision, new labels, input side held (4 layers)"] = [
        (digits, ["strategies=[{kind: layer_transfer, side: input, layers: 4}]"])
    ]
    out["vision, new labels, output side of the body held (4 layers)"] = [
        (digits, ["strategies=[{kind: layer_transfer, layers: ['layer2.2', 'layer3.*']}]"])
    ]
    out["vision, new labels, plain fine-tuning"] = [(digits, ["strategies=[]"])]
    return out


def measure(spec: Path, overrides: list[str], seed: int) -> dict[str, float]:
    """Return the accuracies of a run, in percent, and its seconds."""
    with tempfile.TemporaryDirectory() as folder:
        report: dict[str, Any] = run(load_spec(spec, [*overrides, f"seed={seed}"]), folder)
    row = {"seconds": report["seconds"]["adapt"]}
    for when in ("before", "after"):
        for domain in ("target", "source"):
            row[f"{domain} {when}"] = 100 * report[when][domain]["accuracy"]
    return row


def spread(values: list[float]) -> str:
    """Return mean and standard deviation."""
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("fsdd", "cifar", "weights"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: dict[str, dict[str, list[float]]] = {}
    results: dict[tuple[str, tuple[str, ...], int], dict[str, float]] = {}
    for row, runs in cases(options.fsdd, options.cifar, options.weights).items():
        keys = [(str(spec), tuple(overrides), seed) for spec, overrides in runs for seed in range(options.seeds)]
        for key in keys:
            if key not in results:
                results[key] = measure(Path(key[0]), list(key[1]), key[2])
        rows[row] = {name: [results[key][name] for key in keys] for name in results[keys[0]]}
        print(row, {name: spread(values) for name, values in rows[row].items()}, flush=True)
        store(rows, options.seeds)


def store(rows: dict[str, dict[str, list[float]]], seeds: int) -> None:
    """Write the rows that are measured so far."""
    versions = {"conservtl": __version__, "torch": torch.__version__, "python": platform.python_version()}
    machine = f"{platform.machine()}, CPU, 1 thread"
    date = dt.datetime.now(tz=dt.UTC).date().isoformat()
    report = {"machine": machine, "versions": versions, "date": date, "seeds": seeds, "rows": rows}
    results = HERE / "results"
    results.mkdir(exist_ok=True)
    (results / "runs.json").write_text(json.dumps(report, indent=1) + "\n")
    names = ("target before", "target after", "source before", "source after")
    table = [
        "# Accuracy of the shipped specs\n",
        f"{machine}; {', '.join(f'{name} {version}' for name, version in versions.items())}; {date}.\n",
        f"Accuracy in percent: mean ± standard deviation over {seeds} seeds (and speakers).\n",
        f"| | {' | '.join(names)} | runs |",
        "| --- |" + " ---: |" * (len(names) + 1),
    ]
    table += [
        f"| {row} | {' | '.join(spread(values[name]) for name in names)} | {len(values['seconds'])} |"
        for row, values in rows.items()
    ]
    (results / "runs.md").write_text("\n".join(table) + "\n")


if __name__ == "__main__":
    main()
