"""Long runs and many adaptations: memory, open files and speed stay as they were.

``python tests/faults/soak.py --steps 20000 --adaptations 1000`` prints a line of JSON for each strategy.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import time
from array import array
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import conservtl as ctl

STRATEGIES: dict[str, ctl.Strategy] = {
    "AutoRGN": ctl.AutoRGN(),
    "DiscriminativeLR": ctl.DiscriminativeLR(decay=0.9),
    "EntropyMinimisation": ctl.EntropyMinimisation(),
    "FeatureConservation": ctl.FeatureConservation(),
    "FeatureConservation, attention": ctl.FeatureConservation(attention=True),
    "FeatureConservation, LDIFS": ctl.FeatureConservation(metric="ldifs"),
    "FeatureExtraction": ctl.FeatureExtraction(),
    "FisherSP": ctl.FisherSP(),
    "GradualUnfreezing": ctl.GradualUnfreezing(),
    "GroupLassoSP": ctl.GroupLassoSP(),
    "InputTransform": ctl.InputTransform(),
    "L1SP": ctl.L1SP(),
    "L2SP": ctl.L2SP(),
    "L2SP, decoupled": ctl.L2SP(mode="decoupled"),
    "LHUC": ctl.LHUC(),
    "LPFT": ctl.LPFT(),
    "LayerTransfer": ctl.LayerTransfer(side="input", layers=1),
    "LoRA": ctl.LoRA(rank=2),
    "Mixout": ctl.Mixout(),
    "NormAdaptation": ctl.NormAdaptation(),
    "OutputConservation": ctl.OutputConservation(),
    "Projection": ctl.Projection(radius=1.0),
    "SelectiveDecay": ctl.SelectiveDecay(),
    "SpectralShrinkage": ctl.SpectralShrinkage(),
    "SurgicalFineTuning": ctl.SurgicalFineTuning(block=0),
    "WeightInterpolation": ctl.WeightInterpolation(t=0.5),
}
INPUTS, LABELS = torch.randn(8, 3, 12, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 4


def network() -> nn.Module:
    """Return a small network with batch norms."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.Conv1d(4, 4, 3), nn.BatchNorm1d(4), nn.ReLU(),
        nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, 4),
    )  # fmt: skip


def hooks_of(model: nn.Module) -> int:
    """Return the number of hooks on a model and its modules."""
    kinds = [name for name in model.__dict__ if name.endswith("_hooks")]
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds if hasattr(module, kind))


def after_adaptations(strategy: ctl.Strategy, count: int) -> dict[str, int]:
    """Adapt one model many times, and delete each adaptation; return how many objects and hooks that added.

    The first ten adaptations fill caches, and may leave hooks that belong to the model, as of frozen norms.
    """
    source, model = network(), network()
    additive = isinstance(
        strategy, (ctl.LHUC, ctl.InputTransform, ctl.LoRA, ctl.FeatureExtraction)
    )  # the model stays extended
    for number in range(10 + count):
        if number == 10:
            gc.collect()
            objects, hooks = len(gc.get_objects()), hooks_of(model)
        adaptation = ctl.adapt(network() if additive else model, source, [strategy], example=INPUTS)
        del adaptation
    gc.collect()
    return {"objects": len(gc.get_objects()) - objects, "hooks": hooks_of(model) - hooks}


def after_steps(strategy: ctl.Strategy, steps: int) -> dict[str, Any]:
    """Train; return the growth of memory in KiB and of open files, and the last tenth's step time over the first's."""
    model = network()
    adaptation = ctl.adapt(model, network(), [strategy], example=INPUTS)
    adaptation.measure([(INPUTS, LABELS)])
    optimizer = adaptation.optimizer(torch.optim.AdamW, lr=1e-4)
    tenth, times = max(1, steps // 10), array("d", bytes(8 * steps))  # made before memory is read
    for step in range(steps):
        if step == tenth:
            gc.collect()
            memory, files = _memory(), _open_files()
        begun = time.perf_counter()
        outputs = model(INPUTS)
        adaptation.loss(F.cross_entropy(outputs, LABELS), outputs, INPUTS).backward()
        optimizer.step()
        optimizer.zero_grad()
        times[step] = time.perf_counter() - begun
    gc.collect()
    adaptation.finish(batches=[(INPUTS, LABELS)])
    return {
        "memory_kib": _memory() - memory,
        "files": _open_files() - files,
        "slower": statistics.median(times[-tenth:]) / statistics.median(times[tenth : 2 * tenth]),
    }


def _open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def _memory() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024


def main(arguments: list[str] | None = None) -> dict[str, dict[str, Any]]:
    """Adapt and train with each strategy; return what that left behind."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--adaptations", type=int, default=100)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found = {}
    for name, strategy in STRATEGIES.items():
        found[name] = {"steps": options.steps, **after_steps(strategy, options.steps)}
        found[name] |= {"adaptations": options.adaptations, **after_adaptations(strategy, options.adaptations)}
        print(json.dumps({name: found[name]}), flush=True)  # noqa: T201 - a script
    return found


if __name__ == "__main__":
    main()
