"""Time and memory that each method adds to a training step.

``python benchmarks/conservation.py`` prints the tables and writes ``benchmarks/results/conservation.{json,md}``;
``--models mobilenet_v3_small --rounds 20 --steps 3`` takes less than a minute. Three parts for each network:

- on weights: the method's work around an optimizer's step, with an optimizer that does nothing. It is compared with
  one flat lerp over the same bytes (the floor) and with the penalty as a loop of autograd over named parameters. Each
  round runs all variants in a new random order.
- in a whole training step: each method, alternating with a plain step.
- cached source outputs: ``fit`` with OutputConservation on data in memory, alternating with a plain ``fit``.

With one thread the clock is the process's CPU time, which other load on the machine affects least. Otherwise it is the
wall clock, on a GPU between synchronisations.
"""

from __future__ import annotations

import argparse
import copy
import datetime as dt
import gc
import importlib.metadata
import json
import os
import platform
import random
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torchvision
from engine_measuring import summary
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import conservtl as ctl
from conservtl.compat import foreach_add_, foreach_sub
from conservtl.layers.copying import deep_copy

RESULTS = Path(__file__).parent / "results"
CLASSES, RATE = 1000, 1e-3
CHUNK = 1 << 18
LARGE = 1 << 28
"""Size in bytes above which methods share one copy of the starting point: it would not fit into a cache anyway."""
FLOOR, LOOP = "one flat lerp over the same bytes (the floor)", "the penalty as a loop through autograd"
COUPLED, DECOUPLED = "L2SP", "L2SP, decoupled"
ANNEAL = ctl.Anneal(steps=10**6, end=0.5)

Run = Callable[[], Any]
Times = dict[str, list[float]]

WEIGHTS: dict[str, list[ctl.Strategy]] = {
    COUPLED: [ctl.L2SP(alpha=0.01, on="all")],
    DECOUPLED: [ctl.L2SP(alpha=0.01, on="all", mode="decoupled")],
    "L2SP, annealed": [ctl.L2SP(alpha=0.01, on="all", anneal=ANNEAL)],
    "L2SP, alpha by depth": [ctl.L2SP(alpha=0.01, on="all", depth=(1.0, 0.1))],
    "L2SP, anchors in bf16": [ctl.L2SP(alpha=0.01, on="all", anchors="bf16")],
    "L2SP, decoupled, anchors in bf16": [ctl.L2SP(alpha=0.01, on="all", mode="decoupled", anchors="bf16")],
    "L2SP, anchors on the CPU": [ctl.L2SP(alpha=0.01, on="all", anchors="cpu")],
    "L2SP, decoupled, a rate for each layer": [
        ctl.L2SP(alpha=0.01, on="all", mode="decoupled"),
        ctl.DiscriminativeLR(decay=0.9),
    ],
    "FisherSP": [ctl.FisherSP(alpha=0.01, on="all")],
    "FisherSP, decoupled": [ctl.FisherSP(alpha=0.01, on="all", mode="decoupled")],
    "L1SP": [ctl.L1SP(on="all")],
    "GroupLassoSP": [ctl.GroupLassoSP(on="all")],
    "Projection, Frobenius norm of each tensor": [ctl.Projection(on="all")],
    "Projection, MARS norm of each row": [ctl.Projection(on="all", by="row", norm="mars")],
    "SelectiveDecay": [ctl.SelectiveDecay(on="all")],
    "Mixout": [ctl.Mixout(on="all")],
    "AutoRGN, between decisions": [ctl.AutoRGN(every=10**6)],
}
STEPS: dict[str, list[ctl.Strategy]] = {
    COUPLED: [ctl.L2SP(alpha=0.01)],
    DECOUPLED: [ctl.L2SP(alpha=0.01, mode="decoupled")],
    "OutputConservation, the source run in each step": [ctl.OutputConservation()],
    "OutputConservation, the source's outputs cached": [ctl.OutputConservation()],
    "FeatureConservation": [ctl.FeatureConservation()],
    "FeatureConservation, the source's features cached": [ctl.FeatureConservation()],
    "FeatureConservation, LDIFS": [ctl.FeatureConservation(metric="ldifs")],
    "SpectralShrinkage": [ctl.SpectralShrinkage()],
    "Mixout": [ctl.Mixout()],
    "LHUC": [ctl.LHUC(freeze=False)],
    "InputTransform": [ctl.InputTransform(freeze=False)],
    "NormAdaptation, only affine parameters trained": [ctl.NormAdaptation(statistics="target")],
}


class Still(torch.optim.Optimizer):
    """An optimizer whose step does nothing, so that only the work around it is timed."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> None:
        """Do nothing."""


class Transformer(nn.Module):
    """24 encoder layers of width 1024: 302 M parameters in them."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(1024, 16, 4096, 0.0, "gelu", batch_first=True, norm_first=True)
        self.enter = nn.Conv2d(3, 1024, 16, 16)
        self.layers = nn.ModuleList(copy.deepcopy(layer) for _ in range(24))
        self.head = nn.Linear(1024, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits for images, whose patches are a sequence."""
        x = self.enter(x).flatten(2).transpose(1, 2)
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


def build(name: str, size: int) -> nn.Module:
    torch.manual_seed(0)
    if name == "transformer_300m":
        return Transformer()
    more = {"image_size": size} if name.startswith("vit") else {}
    return getattr(torchvision.models, name)(num_classes=CLASSES, **more)


class Place:
    """A device with its clock and the data of a step.

    Args:
        device: cpu or cuda.
        threads: torch threads on the CPU.
    """

    def __init__(self, device: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self.device = torch.device(device)
        self.clock = time.process_time if device == "cpu" and threads == 1 else time.perf_counter
        self.batch, self.size = (64, 224) if self.cuda else (4, 64)
        self.name = torch.cuda.get_device_name() if self.cuda else f"CPU, {threads} thread{'s' * (threads > 1)}"
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(self.batch, 3, self.size, self.size, generator=generator).to(self.device)
        self.y = torch.randint(CLASSES, (self.batch,), generator=generator).to(self.device)

    @property
    def cuda(self) -> bool:
        """Return whether the device is a GPU."""
        return self.device.type == "cuda"

    def seconds(self, run: Run) -> float:
        """Return the time of a call."""
        self.wait()
        begun = self.clock()
        run()
        self.wait()
        return self.clock() - begun

    def wait(self) -> None:
        """Wait for the device."""
        if self.cuda:
            torch.cuda.synchronize()

    def autocast(self) -> Any:
        """Return autocast to bf16 on a GPU; fp32 on the CPU."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.cuda)

    def syncs(self, run: Run) -> str:
        """Return whether the host waits for the device, according to torch's debug mode."""
        if not self.cuda:
            return ""
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3):
                run()
        except RuntimeError as error:
            return f"yes: {error}".splitlines()[0]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return "no"

    def peak(self, run: Run) -> int | None:
        """Return the peak of temporary memory on the GPU during a call, in bytes."""
        if not self.cuda:
            return None
        self.wait()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        self.wait()
        return torch.cuda.max_memory_allocated() - before


def interleaved(runs: dict[str, Run], place: Place, rounds: int) -> Times:
    """Return the seconds of each variant in each round; the order is random, the first two rounds warm up."""
    times: Times = {name: [] for name in runs}
    order = list(runs)
    for number in range(-2, rounds):
        random.shuffle(order)
        for name in order:
            seconds = place.seconds(runs[name])
            if number >= 0:
                times[name].append(seconds)
    return times


def adapted(model: nn.Module, strategies: Iterable[ctl.Strategy], place: Place) -> ctl.Adaptation:
    adaptation = ctl.adapt(model, {name: t.clone() for name, t in model.state_dict().items()}, list(strategies))
    for one in adaptation.outstanding():
        if one.kind == "fisher":  # measuring takes long, and the values do not matter here
            weighed = [name for penalty in adaptation.plan.penalties if penalty.reads for name in penalty.names]
            adaptation.use_measured(one.name, {name: torch.rand(adaptation.plan[name].shape) for name in weighed})
    adaptation.measure([(place.x, place.y)])
    return adaptation


def held(adaptation: ctl.Adaptation, device: torch.device) -> int:
    """Return the bytes that an adaptation keeps on a device beside the model."""
    tensors: list[Tensor] = [*adaptation.bound.anchors.parameters.values(), *adaptation.bound.anchors.placed.values()]
    for state in (*adaptation.measured.values(), *adaptation.bound.updates.state.values()):
        tensors += state.values()
    if adaptation.bound.terms.source_model is not None:
        tensors += adaptation.bound.terms.source_model.model.state_dict().values()
    stored = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.device.type == device.type
    }
    return sum(stored.values())


def on_weights(name: str, place: Place, rounds: int) -> dict[str, Any]:
    model = build(name, 224).to(place.device)
    parameters = dict(model.named_parameters())
    bare = ctl.adapt(model, model.state_dict())
    plain = held(bare, place.device)
    adaptations: dict[str, ctl.Adaptation] = {}
    for method, strategies in WEIGHTS.items():
        adaptations[method] = adapted(model, strategies, place)
        if sum(t.nbytes for t in parameters.values()) > LARGE:
            adaptations[method].bound.anchors.parameters = bare.bound.anchors.parameters
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(torch.randn_like(parameter), alpha=1e-3)
            parameter.grad = torch.randn_like(parameter)
    runs: dict[str, Run] = dict(by_hand(parameters))
    memory: dict[str, int] = {}
    for method, adaptation in adaptations.items():
        optimizer = adaptation.optimizer(Still, lr=RATE)
        adaptation.bound.before_forward(training=True)
        memory[method] = held(adaptation, place.device)
        optimizer.step()
        memory[method] = max(memory[method], held(adaptation, place.device)) - plain
        runs[method] = around_step(adaptation, optimizer)
    runs[f"{COUPLED}, without the cached lookup"] = without_cache(adapted(model, WEIGHTS[COUPLED], place))
    found = interleaved(runs, place, rounds)
    if place.cuda:
        checks = {method: {"syncs": place.syncs(run), "peak": place.peak(run)} for method, run in runs.items()}
    else:
        checks = {}
    return {
        "parameters": sum(p.numel() for p in parameters.values()),
        "tensors": len(parameters),
        "rows": {
            method: {
                "ms": summary([1e3 * t for t in times]),
                "of the floor": summary(quotients(times, found[FLOOR])),
                "fastest": min(times) / min(found[FLOOR]),
                "the loop takes": summary(quotients(found[LOOP], times)),
                "memory": memory.get(method),
                **checks.get(method, {}),
            }
            for method, times in found.items()
        },
    }


def around_step(adaptation: ctl.Adaptation, optimizer: torch.optim.Optimizer) -> Run:
    """Return a function that runs an adaptation's work before the forward pass and around the optimizer's step."""

    def run() -> None:
        adaptation.bound.before_forward(training=True)
        optimizer.step()

    return run


def without_cache(adaptation: ctl.Adaptation) -> Run:
    """Return a function that runs a step after which the lookup of parameters is built again."""
    optimizer = adaptation.optimizer(Still, lr=RATE)

    def run() -> None:
        adaptation.bound.anchors.revision += 1
        optimizer.step()

    return run


def by_hand(parameters: dict[str, nn.Parameter]) -> Iterator[tuple[str, Run]]:
    """Yield the floor, the loop, and other implementations of the coupled penalty."""
    initial = {name: p.detach().clone() for name, p in parameters.items()}
    weights, anchors = list(parameters.values()), list(initial.values())
    flat, flat_start = (torch.cat([t.detach().reshape(-1) for t in tensors]) for tensors in (weights, anchors))
    yield FLOOR, lambda: flat.lerp_(flat_start, 1e-5)

    def loop() -> None:
        penalty = sum(0.01 / 2 * (p - initial[name]).square().sum() for name, p in parameters.items())
        penalty.backward()  # type: ignore[union-attr]

    yield LOOP, loop
    chunks = list(neighbours(weights))

    @torch.no_grad()
    def at_once() -> None:
        differences = foreach_sub(weights, anchors)
        foreach_add_([p.grad for p in weights], differences, alpha=0.01)

    @torch.no_grad()
    def chunked() -> None:
        for chunk in chunks:
            differences = foreach_sub(weights[chunk], anchors[chunk])
            foreach_add_([p.grad for p in weights[chunk]], differences, alpha=0.01)

    buffer = torch.empty(max(CHUNK, *(p.numel() for p in weights)), device=flat.device)
    sizes = [p.numel() for p in weights]
    ends = torch.tensor([0, *sizes]).cumsum(0).tolist()
    starts = [flat_start[ends[chunk.start] : ends[chunk.stop]] for chunk in chunks]
    buffers = [buffer[: len(start)] for start in starts]
    views = [
        [v.view_as(p) for v, p in zip(part.split(sizes[chunk]), weights[chunk], strict=True)]
        for part, chunk in zip(buffers, chunks, strict=True)
    ]

    @torch.no_grad()
    def flattened() -> None:
        for chunk, start, part, differences in zip(chunks, starts, buffers, views, strict=True):
            torch.cat([p.view(-1) for p in weights[chunk]], out=part)
            part.sub_(start)
            foreach_add_([p.grad for p in weights[chunk]], differences, alpha=0.01)

    yield "coupled by hand, foreach over all tensors", at_once
    yield "coupled by hand, foreach in chunks, large tensors whole", chunked
    yield "coupled by hand, small tensors flattened, large ones whole", flattened


def neighbours(tensors: list[nn.Parameter]) -> Iterator[slice]:
    """Yield slices of neighbouring tensors that fit into one chunk."""
    start, size = 0, 0
    for at, tensor in enumerate(tensors):
        if at > start and size + tensor.numel() > CHUNK:
            yield slice(start, at)
            start, size = at, 0
        size += tensor.numel()
    yield slice(start, len(tensors))


def in_steps(name: str, place: Place, rounds: int) -> dict[str, Any]:
    """Measure each method, alternating with a plain step."""
    rows = {}
    for method, strategies in STEPS.items():
        gc.collect()
        try:
            run = training_step(name, strategies, place, cached=method.endswith("cached"))
        except ctl.InputError as error:
            rows[method] = {"refused": str(error)}
            continue
        plain = training_step(name, [], place)
        plain()
        enough = max(rounds, min(40, int(2 / place.seconds(plain))))  # short steps need more rounds
        found = interleaved({"plain": plain, "method": run}, place, enough)
        rows[method] = {
            "plain ms": summary([1e3 * t for t in found["plain"]]),
            "added ms": summary([1e3 * (a - b) for a, b in zip(found["method"], found["plain"], strict=True)]),
            "of a plain step": summary(quotients(found["method"], found["plain"])),
        }
        if place.cuda:
            rows[method] |= {"syncs": place.syncs(run), "peak": place.peak(run), "plain peak": place.peak(plain)}
    return {"batch": place.batch, "size": place.size, "rows": rows}


def training_step(name: str, strategies: list[ctl.Strategy], place: Place, *, cached: bool = False) -> Run:
    model = build(name, place.size).to(place.device)
    adaptation = adapted(model, strategies, place)
    optimizer = adaptation.optimizer(torch.optim.SGD, lr=RATE, momentum=0.9)
    with place.autocast():
        source = adaptation.source_view(place.x) if cached else None
    model.train()

    def run() -> None:
        with place.autocast():
            outputs = model(place.x)
            loss = adaptation.loss(F.cross_entropy(outputs, place.y), outputs, place.x, source=source)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def cached_outputs(name: str, place: Place, rounds: int) -> dict[str, Any]:
    """Measure the fastest step of ``fit`` with cached source outputs, alternating with a plain ``fit``."""
    steps = 8
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(place.batch * steps, 3, place.size, place.size, generator=generator)
    data = x, torch.randint(CLASSES, (len(x),), generator=generator)
    device, precision = ("cuda", "bf16") if place.cuda else ("cpu", "fp32")
    training = ctl.Training(epochs=3, batch_size=place.batch, lr=1e-4, device=device, precision=precision)

    def fastest_step(strategies: list[ctl.Strategy]) -> float:
        model = build(name, place.size)
        adaptation = ctl.adapt(model, deep_copy(model), strategies)
        stamps: list[float] = []

        def stamp(*_: Any) -> None:
            place.wait()
            stamps.append(place.clock())

        model.register_forward_pre_hook(stamp)
        ctl.fit(adaptation, data, training=training)
        return min(b - a for a, b in pairwise(stamps[steps:]))

    cases: dict[str, list[ctl.Strategy]] = {"plain": [], "cached": [ctl.OutputConservation()]}
    found: Times = {case: [] for case in cases}
    for number in range(-1, rounds):
        for case in random.sample(list(cases), 2):
            gc.collect()
            seconds = fastest_step(cases[case])
            if number >= 0:
                found[case].append(seconds)
    return {
        "plain ms": summary([1e3 * t for t in found["plain"]]),
        "of a plain step": summary(quotients(found["cached"], found["plain"])),
    }


def quotients(values: list[float], bases: list[float]) -> list[float]:
    return [a / b for a, b in zip(values, bases, strict=True)]


def formatted(row: dict[str, float], digits: int = 2) -> str:
    return f"{row['median']:.{digits}f} ({row['low']:.{digits}f} to {row['high']:.{digits}f})"


def bytes_of(count: int | None) -> str:
    return "" if count is None else f"{count / 2**20:.1f}"


def tables(name: str, where: str, part: dict[str, Any]) -> list[str]:
    found, gpu = part["weights"], "syncs" in part["weights"]["rows"][COUPLED]
    more = (" host waits | peak, MiB |", " --- | ---: |") if gpu else ("", "")
    lines = [
        f"## {name} on {where}",
        "",
        f"On weights, {found['parameters'] / 1e6:.1f} million in {found['tensors']} tensors:",
        "",
        f"| around a step | ms | of the floor | fastest | the loop takes, times this | memory, MiB |{more[0]}",
        f"| --- | ---: | ---: | ---: | ---: | ---: |{more[1]}",
    ]
    for method, row in found["rows"].items():
        rest = f" {row['syncs']} | {bytes_of(row['peak'])} |" if gpu else ""
        lines.append(
            f"| {method} | {row['ms']['median']:.2f} | {formatted(row['of the floor'])} | {row['fastest']:.2f} | "
            f"{row['the loop takes']['median']:.1f} | {bytes_of(row['memory'])} |{rest}"
        )
    if "steps" in part:
        found = part["steps"]
        lines += [
            "",
            f"In a step of training on {found['batch']} images of {found['size']} pixels, SGD with momentum:",
            "",
            f"| method | plain step, ms | added, ms | of a plain step |{more[0]}",
            f"| --- | ---: | ---: | ---: |{more[1]}",
        ]
        for method, row in found["rows"].items():
            if "refused" in row:
                lines.append(f"| {method} | | refused: {row['refused'].split('.')[0]} | |{' | |' if gpu else ''}")
                continue
            rest = f" {row['syncs']} | {bytes_of(row['peak'] - row['plain peak'])} |" if gpu else ""
            lines.append(
                f"| {method} | {row['plain ms']['median']:.1f} | {formatted(row['added ms'])} | "
                f"{formatted(row['of a plain step'], 3)} |{rest}"
            )
    if "cached" in part:
        ratio = formatted(part["cached"]["of a plain step"], 3)
        lines += ["", f"`fit` with OutputConservation, the source's outputs cached: {ratio} of a plain step."]
    return [*lines, ""]


GOALS = [
    ("resnet50", COUPLED, 3.0),
    ("resnet50", DECOUPLED, 1.3),
    ("mobilenet_v3_small", COUPLED, 5.0),
    ("mobilenet_v3_small", DECOUPLED, 2.0),
]


def goals(report: dict[str, Any]) -> list[str]:
    """Return the table of goals and measurements."""
    lines = ["| goal | device | measured | fastest | at most |", "| --- | --- | ---: | ---: | ---: |"]
    for part in report["parts"]:
        rows = part["weights"]["rows"]
        for network, method, most in GOALS:
            if network == part["model"] and not part["gpu"]:
                lines.append(
                    f"| {network}: {method}, of the floor | {part['where']} | "
                    f"{rows[method]['of the floor']['median']:.2f} | {rows[method]['fastest']:.2f} | {most:g} |"
                )
        if part["gpu"] and part["model"] == "resnet50" and "steps" in part:
            for method in (COUPLED, DECOUPLED):
                share = rows[method]["ms"]["median"] / part["steps"]["rows"][method]["plain ms"]["median"]
                lines.append(f"| resnet50: {method}, of a plain step | {part['where']} | {share:.4f} | | 0.01 |")
        if "cached" in part:
            share = part["cached"]["of a plain step"]["median"]
            lines.append(f"| {part['model']}: cached outputs | {part['where']} | {share:.3f} | | 1.05 |")
    return [*lines, ""]


def machine() -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next((line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line), cpu)
    packages = ("conservtl", "torch", "torchvision")
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU",
        "load before": round(os.getloadavg()[0], 2),
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "versions": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in packages},
    }


def head(report: dict[str, Any]) -> list[str]:
    place = report["machine"]
    versions = ", ".join(f"{package} {version}" for package, version in place["versions"].items())
    on = (
        f"{place['cpu']}, {place['cores']} cores, {place['gpu']}, load {place['load before']} before and "
        f"{place['load after']} after; {versions}; {place['date']}."
    )
    method = (
        "Networks of torchvision with random weights, fp32 on the CPU and bf16 autocast on a GPU. Medians over "
        f"{report['rounds']} rounds around a step, at least {report['steps']} of whole steps, {report['fits']} of fits "
        "(the fastest step of each), quartiles in brackets; ratios are formed within a round. Fastest: the fastest "
        "round divided by the floor's fastest, which other load on the machine affects least. With one thread the "
        "clock is the process's CPU time. Memory: beside the model, in addition to plain fine-tuning, which keeps the "
        "starting point on the CPU; there, anchors in fp32 need no more. Made by `python benchmarks/conservation.py`."
    )
    return ["# Time and memory of staying close to the source", "", on, "", method, ""]


def places(threads: list[int]) -> Iterator[tuple[str, int]]:
    for count in threads:
        yield "cpu", count
    if torch.cuda.is_available():
        yield "cuda", os.cpu_count() or 1


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    models = ["resnet50", "vit_b_16", "mobilenet_v3_small", "transformer_300m"]
    parser.add_argument("--models", nargs="+", choices=models, default=models)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, os.cpu_count() or 1], help="on the CPU")
    parser.add_argument("--rounds", type=int, default=40, help="rounds around a step")
    parser.add_argument("--steps", type=int, default=5, help="rounds of whole steps; 0 for none")
    parser.add_argument("--fits", type=int, default=5, help="rounds of fits; 0 for none")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    random.seed(0)
    report: dict[str, Any] = {"machine": machine(), "parts": []} | vars(options)
    del report["out"]
    lines: list[str] = []
    measured = False  # steps and fits are measured once on the CPU
    for device, threads in places(options.threads):
        place = Place(device, threads)
        for name in options.models:
            if name == "transformer_300m" and not place.cuda:
                continue
            gc.collect()
            part = {"model": name, "where": place.name, "gpu": place.cuda}
            part["weights"] = on_weights(name, place, options.rounds if name != "vit_b_16" else options.rounds // 2)
            if options.steps and (place.cuda or not measured):
                part["steps"] = in_steps(name, place, options.steps)
            if options.fits and name != "transformer_300m" and (place.cuda or not measured):
                part["cached"] = cached_outputs(name, place, options.fits)
            report["parts"].append(part)
            lines += tables(name, place.name, part)
            print("\n".join(tables(name, place.name, part)), flush=True)
        measured = True
    report["machine"]["load after"] = round(os.getloadavg()[0], 2)
    lines = head(report) + goals(report) + lines
    print("\n".join(head(report) + goals(report)))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "conservation.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (options.out / "conservation.md").write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
