"""The shipped recipes on a CPU and on a GPU over three seeds, from the same specs; a part of ``gpu.py``."""

from __future__ import annotations

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


def measured(seeds: int, *, quick: bool = False) -> dict[str, Any]:
    """Run each recipe with each seed on each device.

    Args:
        seeds: number of seeds.
        quick: an epoch of each training, on the CPU alone.
    """
    devices = ["cpu", "cuda"] if torch.cuda.is_available() and not quick else ["cpu"]
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (path, changes) in list(RECIPES.items())[: 1 if quick else None]:
            for seed in range(seeds):
                for device in devices:
                    places = [f"{where}.device={device}" for where in ("training", "source.training")]
                    short = [f"{where}.epochs=1" for where in ("training", "source.training")] if quick else []
                    changed = [*changes, *places, *short, f"seed={seed}", f"source.cache={folder}/{device}"]
                    report = run(load_spec(EXAMPLES / path, changed), Path(folder) / f"{name}-{seed}-{device}")
                    metric = report["metric"]["name"]
                    scores = {side: (report["after"][side] or {}).get(metric) for side in ("target", "source")}
                    rows.setdefault(name, {}).setdefault(f"{seed}", {})[device] = scores
    return {"devices": devices, "rows": rows}
