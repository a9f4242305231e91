"""Peak memory a process: one, replicas (DDP) and shards (FSDP2), of a transformer with 300 million parameters.

    python benchmarks/distributed.py [--layers 24] [--width 1024]

Each row trains a few steps on short sequences by AdamW, in fp32, with as many examples a process. "Steps" is the peak
within the steps; "all" is that of the whole run, in which each process holds the model whole before it is cut and after
it is put together. On the CPU it is the resident memory above that of the imports, on CUDA what torch has allocated. A
few minutes on two quiet cores; a row for which there is too little memory is left empty. Results:
results/distributed.json and distributed.md.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import platform
import socket
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import accelerate  # noqa: F401 - here, so that it is not imported by each process
import torch
import torch.distributed.fsdp
from torch import Tensor, nn

import conservtl as ctl
from conservtl import __version__

RESULTS = Path(__file__).parent / "results"
SHARED = {"one process": ("auto", 1), "FSDP2, 2": ("fsdp2", 2), "FSDP2, 3": ("fsdp2", 3), "DDP, 2": ("ddp", 2)}
METHODS: dict[str, list[ctl.Strategy]] = {
    "plain": [],
    "L2-SP": [ctl.L2SP(alpha=0.01)],
    "Fisher, decoupled": [ctl.FisherSP(alpha=0.01, mode="decoupled")],
    "output conservation": [ctl.OutputConservation()],
}
STEPS, TOKENS, WORDS = 2, 4, 1000


class Network(nn.Module):
    """A transformer's encoder, the mean of whose outputs is classified."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, width)
        self.blocks = nn.ModuleList(
            [nn.TransformerEncoderLayer(width, width // 64, 4 * width, 0.0, batch_first=True) for _ in range(layers)]
        )
        self.head = nn.Linear(width, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits (N, 10) of tokens (N, T)."""
        states: Tensor = self.embedding(tokens)
        for block in self.blocks:
            states = block(states)
        logits: Tensor = self.head(states.mean(1))
        return logits


class Peak:
    """Peak memory of this process."""

    def __init__(self, device: str) -> None:
        self.cuda, self.before = device == "cuda", 0.0
        self.before = self.read("VmRSS")

    def reset(self) -> None:
        """Begin anew."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")

    def read(self, field: str = "VmHWM") -> float:
        """Return it in GiB."""
        if self.cuda:
            return torch.cuda.max_memory_allocated() / 2**30
        lines = Path("/proc/self/status").read_text().splitlines()
        (kib,) = (int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
        return kib / 2**20 - self.before


def train(how: str, method: str, layers: int, width: int) -> dict[str, float]:
    """Train in this process, which may be one of many; return its peaks and the seconds of a step."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    device = "cuda" if torch.cuda.device_count() >= world else "cpu"
    peak = Peak(device)
    with torch.device("meta"):  # random values would take longer than the steps
        model = Network(layers, width)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.01)
    adaptation = ctl.adapt(model, ctl.itself(missing=[]), METHODS[method])
    generator = torch.Generator().manual_seed(1)
    count = STEPS * world
    data = torch.randint(0, WORDS, (count, TOKENS), generator=generator), torch.arange(count) % 10
    found = {"parameters": float(sum(one.numel() for one in model.parameters()))}
    times: list[float] = []

    def loss(outputs: Tensor, batch: Any) -> Tensor:
        """Read the peak between two losses: a backward pass, the optimizer's step and a forward pass."""
        value = nn.functional.cross_entropy(outputs, batch[1])
        if model.training and value.requires_grad:
            times.append(time.perf_counter())
            found["all"] = max(found.get("all", 0.0), peak.read())
            if len(times) == STEPS:
                found["steps"] = peak.read()
                found["seconds"] = times[-1] - times[-2]
            elif len(times) == 1:
                peak.reset()
        return value

    training = ctl.Training(epochs=1, batch_size=1, device=device, precision="fp32", distributed=how)
    ctl.fit(adaptation, data, training=training, loss=loss, seed=0)
    found["all"] = max(found["all"], peak.read())
    return found


def fits(how: str, world: int, method: str, options: argparse.Namespace) -> bool:
    """Return whether there is memory for a cell, waiting for it for two minutes."""
    if torch.cuda.is_available():
        return True
    kept = 4 + ("L2" in method) + 2 * ("Fisher" in method)  # weights, gradients, moments, starting values, Fisher
    whole = world * (1 + (method == "output conservation"))  # in each process at the start and the end
    copies = world * (kept + 1) if how == "ddp" else kept + whole
    needed = copies * 4 * (12 * options.layers * options.width**2 + WORDS * options.width) / 2**20 + 1024
    for _ in range(24):
        lines = Path("/proc/meminfo").read_text().splitlines()
        (free,) = (int(line.split()[1]) / 2**10 for line in lines if line.startswith("MemAvailable:"))
        if free > needed:
            return True
        time.sleep(5)
    return False


def measure(how: str, world: int, method: str, options: argparse.Namespace) -> dict[str, float]:
    """Return the largest numbers of all processes of a row."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
        free.close()
        children = []
        for rank in range(world):
            if child := os.fork():  # everything is imported already
                children.append(child)
                continue
            try:
                names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
                if world > 1:
                    os.environ |= {name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "127.0.0.1"}
                found = train(how, method, options.layers, options.width)
                Path(folder, f"{rank}.json").write_text(json.dumps(found))
            except BaseException:  # noqa: BLE001 - shown; the parent stops
                traceback.print_exc()
            finally:
                os._exit(0)
        for child in children:
            os.waitpid(child, 0)
        codes = [Path(folder, f"{rank}.json").is_file() for rank in range(world)]
        if not all(codes):
            raise RuntimeError(f"{how} with {world} processes, {method}: no result")
        ranks = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(world)]
    return {name: max(one[name] for one in ranks) for name in ranks[0]}


def store(rows: dict[str, dict[str, dict[str, float]]], options: argparse.Namespace) -> None:
    """Write the rows that are measured so far."""
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    machine = f"{platform.system()} {platform.machine()}, {cuda or f'CPU, {os.cpu_count()} cores, gloo'}"
    versions = {"conservtl": __version__, "torch": torch.__version__, "python": platform.python_version()}
    date = dt.datetime.now(tz=dt.UTC).date().isoformat()
    report = {"machine": machine, "versions": versions, "date": date, "layers": options.layers, "width": options.width}
    (RESULTS / "distributed.json").write_text(json.dumps(report | {"rows": rows}, indent=1) + "\n")
    millions = next(iter(next(iter(rows.values())).values()))["parameters"] / 1e6
    made = f"{machine}; {', '.join(f'{name} {version}' for name, version in versions.items())}; {date}."
    about = (
        f"A transformer of {options.layers} layers of width {options.width}: {millions:.0f} million parameters, fp32, "
        f"AdamW, one sequence of {TOKENS} tokens a process and step. GiB of the largest process above its imports: "
        "within the steps, and in brackets over the whole run, in which each process holds the model whole before and "
        "after them. Starting values are kept without a penalty too, for the drift. An empty cell was not measured."
    )
    lines = [
        "# Peak memory a process\n",
        f"{made} Made by `python benchmarks/distributed.py`.\n",
        f"{about}\n",
        f"| | {' | '.join(METHODS)} |",
        "| --- |" + " ---: |" * len(METHODS),
    ]
    for row in SHARED:
        cells = rows.get(row, {})
        shown = [f"{cells[name]['steps']:.1f} ({cells[name]['all']:.1f})" if name in cells else "" for name in METHODS]
        lines.append(f"| {row} | {' | '.join(shown)} |")
    (RESULTS / "distributed.md").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--keep", action="store_true", help="measure only the cells that the results have not")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # read by Accelerate
    torch.set_num_threads(1)
    rows: dict[str, dict[str, dict[str, float]]] = {}
    if options.keep and (file := RESULTS / "distributed.json").is_file():
        before = json.loads(file.read_text())
        if (before["layers"], before["width"]) == (options.layers, options.width):
            rows = before["rows"]
    for row, (how, world) in SHARED.items():
        rows.setdefault(row, {})
        for method in METHODS:
            if method in rows[row]:
                continue
            if not fits(how, world, method, options):
                print(row, method, "needs more memory", flush=True)
                continue
            rows[row][method] = measure(how, world, method, options)
            print(row, method, rows[row][method], flush=True)
            store(rows, options)


if __name__ == "__main__":
    main()
