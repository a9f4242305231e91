"""Everything that a GPU is for, in under eight minutes on one: tables with the card's name.

``python benchmarks/gpu.py`` prints the tables and writes ``benchmarks/results/gpu.{json,md}``. ``--check`` runs every
row on a tiny network, on the CPU if there is no GPU, and writes nothing; ``--only weights steps`` measures some parts.
What fails is named, at the end too, and the rest measured. Results are written part by part: after a run that was cut
off, ``--resume`` measures the rest.

- weights: each method's work around an optimizer's step that does nothing, in multiples of one flat lerp over the same
  bytes, beside what is wanted at most; ResNet-50 and a transformer of 300 M parameters. Also whether the host waits.
- bus: anchors on the CPU, in multiples of one copy of the same bytes from pinned memory.
- steps: methods on features, outputs and inputs in a step of ResNet-50, alternating with a plain step.
- engine: ``fit`` beside loops by hand, Lightning and Hugging Face's Trainer (``gpu_engine.py``), for ResNet-50,
  ViT-B/16 and wav2vec 2.0; ``--only engine --models resnet50`` takes less than a minute with ``--minutes 0.8``.
- recipes: the shipped recipes over three seeds on the GPU, beside those on the CPU, which a machine without a GPU makes
  (``gpu_recipes.py``); only if they are named.

Methods, networks and clocks are those of ``conservation.py``. The time limit (``--minutes``) divides the rounds.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import conservation as base
import gpu_engine
import gpu_recipes
import torch
from gpu_report import LostDeviceError, Report, tried
from torch import nn

import conservtl as ctl
from conservtl.compat import foreach_lerp_
from conservtl.kernels.backend import fused_on

RESULTS = Path(__file__).parent / "results"
SHARES = {"weights": 2.0, "bus": 0.5, "steps": 2.5, "engine": 3.0, "recipes": 1.0}
"""Part -> its share of the time for each network. Recipes take what they take."""
MODELS = {
    "weights": ["resnet50", "transformer_300m"],
    "bus": ["resnet50"],
    "steps": ["resnet50"],
    "engine": ["resnet50", "vit_b_16", "wav2vec2_base"],
    "recipes": ["all"],
}

METHODS: dict[str, tuple[list[ctl.Strategy], float]] = {
    "L2SP": (base.WEIGHTS[base.COUPLED], 2.0),
    "L2SP, annealed": (base.WEIGHTS["L2SP, annealed"], 2.0),
    "L2SP, alpha by depth": (base.WEIGHTS["L2SP, alpha by depth"], 2.0),
    "L2SP, anchors in bf16": (base.WEIGHTS["L2SP, anchors in bf16"], 2.0),
    "L2SP, every 10 steps": ([ctl.L2SP(alpha=0.01, on="all", every=10)], 2.0),
    "FisherSP": (base.WEIGHTS["FisherSP"], 2.6),
    "L2SP, decoupled": (base.WEIGHTS[base.DECOUPLED], 1.5),
    "L2SP, decoupled, a rate for each layer": (base.WEIGHTS["L2SP, decoupled, a rate for each layer"], 1.5),
    "L2SP, decoupled, anchors in bf16": (base.WEIGHTS["L2SP, decoupled, anchors in bf16"], 2.0),
    "FisherSP, decoupled": (base.WEIGHTS["FisherSP, decoupled"], 2.6),
    "L1SP": (base.WEIGHTS["L1SP"], 3.0),
    "GroupLassoSP": (base.WEIGHTS["GroupLassoSP"], 3.0),
    "Projection, by tensor": ([ctl.Projection(on="all")], 5.0),
    "Projection, by row": ([ctl.Projection(on="all", by="row")], 5.0),
    "Projection, by row, MARS": ([ctl.Projection(on="all", by="row", norm="mars")], 5.0),
    "SelectiveDecay": (base.WEIGHTS["SelectiveDecay"], 5.0),
    "Mixout": (base.WEIGHTS["Mixout"], 6.0),
    "AutoRGN, between decisions": (base.WEIGHTS["AutoRGN, between decisions"], 2.0),
}
"""Method -> its strategies, and the multiple of the floor that is wanted at most."""
STEPS = {
    method: strategies for method, strategies in base.STEPS.items() if method not in {base.COUPLED, base.DECOUPLED}
} | {"LHUC, all else frozen": [ctl.LHUC()]}
HAND = ("by hand: foreach sub and add over all tensors", "by hand: foreach lerp over all tensors")


class Tiny(nn.Module):
    """A network with every kind of layer that the methods act on, for ``--check``."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, 8, 3, 4)
        self.norm = nn.BatchNorm2d(8)
        self.body = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 16), nn.ReLU())
        self.head = nn.Linear(16, base.CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits."""
        return self.head(self.body(self.norm(self.enter(x))))


def on_weights(model: nn.Module, place: base.Place, seconds: float) -> dict[str, Any]:
    """Measure methods one after the other, each alternating with the floor, so that one copy of the anchors is held."""
    parameters = dict(model.named_parameters())
    start = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    weights = [parameter.detach() for parameter in parameters.values()]
    anchors = [start[name] for name in parameters]
    for parameter in parameters.values():
        parameter.grad = torch.randn_like(parameter)
    flat, other = torch.randn(2, sum(weight.numel() for weight in weights), device=place.device)
    floor = lambda: flat.lerp_(other, 1e-5)  # noqa: E731 - one of a list of things to time
    gradients = [parameter.grad for parameter in parameters.values()]
    hand = {
        HAND[0]: lambda: base.foreach_add_(gradients, base.foreach_sub(weights, anchors), alpha=0.01),
        HAND[1]: lambda: foreach_lerp_(weights, anchors, 1e-5),
    }

    def row(method: str) -> dict[str, Any]:
        wanted = None
        if method in hand:
            run: base.Run = torch.no_grad()(hand[method])
        else:
            strategies, wanted = METHODS[method]
            adaptation = adapted(model, start, strategies)
            run = base.around_step(adaptation, adaptation.optimizer(base.Still, lr=base.RATE))
        begun = time.perf_counter()
        for _ in range(3):
            run()
        place.wait()
        warm = time.perf_counter() - begun
        rounds = rounds_in(seconds / (len(hand) + len(METHODS)), lambda: place.seconds(run))
        found = base.interleaved({"floor": floor, "method": run}, place, rounds)
        return {
            "ms": 1e3 * statistics.median(found["method"]),
            "floor ms": 1e3 * statistics.median(found["floor"]),
            "of the floor": base.summary(base.quotients(found["method"], found["floor"])),
            "wanted": wanted,
            "first calls, s": warm,
            "waits": place.syncs(run),
            "peak": place.peak(run),
        }

    rows = {method: tried(partial(row, method)) for method in [*hand, *METHODS]}
    floor_ms = statistics.median(row["floor ms"] for row in rows.values() if "failed" not in row)
    return {"parameters": sum(w.numel() for w in weights), "tensors": len(weights), "floor ms": floor_ms, "rows": rows}


def adapted(model: nn.Module, start: dict[str, torch.Tensor], strategies: list[ctl.Strategy]) -> ctl.Adaptation:
    """Return an adaptation that needs no measurement, with weights at some distance from the source."""
    model.load_state_dict(start)
    adaptation = ctl.adapt(model, start, strategies)
    for one in adaptation.outstanding():
        if one.kind == "fisher":
            weighed = [name for penalty in adaptation.plan.penalties if penalty.reads for name in penalty.names]
            adaptation.use_measured(one.name, {name: torch.rand(adaptation.plan[name].shape) for name in weighed})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=1e-3)
    return adaptation


def over_the_bus(model: nn.Module, place: base.Place, seconds: float) -> dict[str, Any]:
    """Measure anchors on the CPU, alternating with one copy of the same bytes."""
    start = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    size = sum(parameter.numel() for parameter in model.parameters())
    host, held = torch.randn(size, pin_memory=place.cuda), torch.empty(size, device=place.device)
    rows = {}
    for mode in ("coupled", "decoupled"):
        adaptation = adapted(model, start, [ctl.L2SP(alpha=0.01, on="all", mode=mode, anchors="cpu")])
        run = base.around_step(adaptation, adaptation.optimizer(base.Still, lr=base.RATE))
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        runs = {"copy": lambda: held.copy_(host, non_blocking=True), "method": run}
        found = base.interleaved(runs, place, rounds_in(seconds / 2, lambda run=run: place.seconds(run)))
        ratio = base.summary(base.quotients(found["method"], found["copy"]))
        rows[mode] = {"ms": 1e3 * statistics.median(found["method"]), "of the copy": ratio, "waits": place.syncs(run)}
    return {"copy ms": 1e3 * statistics.median(found["copy"]), "rows": rows}


def in_steps(name: str, place: base.Place, seconds: float) -> dict[str, Any]:
    """Measure methods in whole steps, each alternating with a plain step."""
    plain = base.training_step(name, [], place)
    plain()

    def row(method: str) -> dict[str, Any]:
        try:
            run = base.training_step(name, STEPS[method], place, cached=method.endswith("cached"))
        except ctl.InputError as error:
            return {"refused": str(error)}
        run()
        rounds = rounds_in(seconds / len(STEPS), lambda: place.seconds(run))
        found = base.interleaved({"plain": plain, "method": run}, place, rounds)
        return {
            "plain ms": 1e3 * statistics.median(found["plain"]),
            "of a plain step": base.summary(base.quotients(found["method"], found["plain"])),
            "waits": place.syncs(run),
            "memory": None if not place.cuda else (place.peak(run) or 0) - (place.peak(plain) or 0),
        }

    return {
        "batch": place.batch, "size": place.size, "rows": {method: tried(partial(row, method)) for method in STEPS}
    }  # fmt: skip


def rounds_in(seconds: float, once: Any) -> int:
    """Return the number of rounds of two runs that fit into some seconds: at least 3, at most 60."""
    return max(3, min(60, int(seconds / max(2 * once(), 1e-4))))


def measured(options: argparse.Namespace) -> Report:
    """Measure the parts that are left, and return all."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    place = base.Place(device, torch.get_num_threads())
    if options.check:
        place.batch, place.size = 4, 32
        place.x, place.y = place.x[:4, :, :32, :32], place.y[:4]
        base.build = lambda *_: Tiny()
    folder = None if options.check or device == "cpu" else options.out
    report = Report(folder, base.machine(), triton=fused_on(torch.device("cuda")), resume=options.resume)
    names = {part: ["tiny"] if options.check else options.models or MODELS[part] for part in options.only}
    wanted = [(part, name) for part in options.only for name in names[part]]
    shares = sum(SHARES[part] for part, _ in wanted)
    for part, name in report.left(wanted):
        seconds = 60 * options.minutes * SHARES[part] / shares
        try:
            report.add(part, name, tried(partial(of_part, part, name, place, seconds, options)))
        except LostDeviceError as error:
            report.add(part, name, {"failed": str(error)})
            break
    return report


def of_part(part: str, name: str, place: base.Place, seconds: float, options: argparse.Namespace) -> dict[str, Any]:
    """Measure a part for a network, in about so many seconds."""
    if part == "recipes":
        return gpu_recipes.measured(1 if options.check else options.seeds, None if options.check else options.out)
    if part == "engine":
        tiny = Tiny() if options.check else None
        return gpu_engine.measured(name, place, seconds, compiled=options.compiled, tiny=tiny)
    if part == "steps":
        return in_steps(name, place, seconds)
    model = base.build(name, 224).to(place.device)
    return (on_weights if part == "weights" else over_the_bus)(model, place, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="tiny sizes, nothing written")
    parser.add_argument("--only", nargs="+", choices=SHARES, default=["weights", "bus", "steps", "engine"])
    parser.add_argument("--models", nargs="+", help="networks, instead of each part's own")
    parser.add_argument("--resume", action="store_true", help="keep today's results of this card, measure the rest")
    parser.add_argument("--compiled", action="store_true", help="engine: compiled loops too, a minute each")
    parser.add_argument("--seeds", type=int, default=3, help="recipes: number of seeds")
    parser.add_argument("--minutes", type=float, default=7.0, help="time to fill")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    random.seed(0)
    if options.check:
        options.minutes = min(options.minutes, 0.02)
    elif not torch.cuda.is_available() and options.only != ["recipes"]:
        parser.error("there is no GPU here: run it with --check, or benchmarks/conservation.py for the CPU")
    report = measured(options)
    if found := report.failures():
        sys.exit("\n".join(["failed (add --resume to measure the rest, and these again):", *found]))


if __name__ == "__main__":
    main()
