"""The shipped recipes on a CPU and on a GPU over three seeds, from the same specs; a part of ``gpu.py``.

Each run is kept in ``gpu_recipes.json``: a machine with a GPU makes one half, a machine without one the other.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from conservtl.experiments.run.runner import run
from conservtl.experiments.spec.spec import load_spec

EXAMPLES = Path(__file__).parents[1] / "examples"
RECIPES = {
    "speaker": ("speech/spec.yaml", ["strategies={recipe: speaker}", "training={}"]),
    "vision": ("vision/spec.yaml", ["strategies={recipe: vision}", "training={}"]),
    "transcribe": ("speech/transcribe.yaml", []),
}
"""Recipe -> a spec that needs no data, and its changes."""


def measured(seeds: int, out: Path | None) -> dict[str, Any]:
    """Run each recipe with each seed on the GPU, or on the CPU where there is none; return what is known of both.

    Args:
        seeds: number of seeds.
        out: folder of the runs that are known, which others are added to; None: an epoch of one recipe is trained, on
            the CPU, and nothing is written.
    """
    file = None if out is None else out / "gpu_recipes.json"
    rows: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file is not None and file.exists() else {}
    device = "cuda" if torch.cuda.is_available() and file is not None else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        for name in RECIPES if file is not None else ["speaker"]:
            for seed in map(str, range(seeds)):
                kept = rows.setdefault(name, {}).setdefault(seed, {})
                if device not in kept:
                    kept[device] = _scores(name, seed, device, Path(folder), quick=file is None)
                    if file is not None:
                        file.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    devices = [one for one in ("cpu", "cuda") if any(one in each for seeds in rows.values() for each in seeds.values())]
    whole = {
        name: {seed: each for seed, each in by_seed.items() if all(one in each for one in devices)}
        for name, by_seed in rows.items()
    }
    return {"devices": devices, "rows": {name: by_seed for name, by_seed in whole.items() if by_seed}}


def _scores(name: str, seed: str, device: str, folder: Path, *, quick: bool) -> dict[str, float]:
    """Return the metric of a run on both domains."""
    path, changes = RECIPES[name]
    places = [f"{where}.device={device}" for where in ("training", "source.training")]
    short = [f"{where}.epochs=1" for where in ("training", "source.training")] if quick else []
    changed = [*changes, *places, *short, f"seed={seed}", f"source.cache={folder}/{device}"]
    report = run(load_spec(EXAMPLES / path, changed), folder / f"{name}-{seed}-{device}")
    metric = report["metric"]["key"]
    return {side: report["after"][side][metric] for side in ("target", "source")}
