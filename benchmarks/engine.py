"""Speed of the engine compared with loops written by hand and with other libraries.

``python benchmarks/engine.py`` prints the tables and writes ``benchmarks/results/engine.{json,md}``; with ``--only
conformer`` one network anew, the others staying as they are there.
Each round runs all variants in a new random order, so that other load on the machine affects all equally. Ratios are
formed within a round, and their median over rounds is reported with its quartiles. Time is measured from the first step
of the second epoch to the last step of the last, without setup. There are two rates: that of the median step, which
other load affects least, and that of the whole time, which includes the work between epochs.
"""

from __future__ import annotations

import argparse
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import trainers
from engine_conformer import PROBLEM as CONFORMER
from engine_measuring import Problem, Variant, in_turn, keep_freed_memory, machine, measure, ratios, summary
from engine_tables import CACHED, FROZEN, table
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

import conservtl as ctl
from conservtl.engine.frozen_prefix_cache import cache_frozen_prefix
from conservtl.engine.held import Held
from conservtl.layers.copying import deep_copy
from conservtl.tasks.speech.features import SpeechPreprocessing
from conservtl.tasks.speech.models import ModelSpec, build

RECORDINGS, BATCH, CLASSES, LR = 2048, 64, 10, 1e-4
SAME_DECAY = ctl.DiscriminativeLR(groups={"*": 1.0}, decay_biases_and_norms=True)  # one group, as in the other loops
RESULTS = Path(__file__).parent / "results"


def keyword_network() -> nn.Module:
    return build(ModelSpec(), SpeechPreprocessing(), CLASSES)


def small_cnn() -> nn.Module:
    bands = SpeechPreprocessing().features.shape[0]
    return nn.Sequential(
        nn.Conv1d(bands, 16, 9, 2, 4), nn.ReLU(), nn.Conv1d(16, 32, 9, 2, 4), nn.ReLU(),
        nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(32, CLASSES),
    )  # fmt: skip


def recordings() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = SpeechPreprocessing().features.shape
    inputs = torch.randn(RECORDINGS, *shape, generator=generator)
    return inputs, torch.randint(0, CLASSES, (RECORDINGS,), generator=generator)


DATA = recordings()


def loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(*DATA), BATCH, shuffle=True)


def by_index(model: nn.Module, epochs: int, **options: Any) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, **options)
    inputs, labels = DATA
    model.train()
    for _ in range(epochs):
        for index in torch.randperm(RECORDINGS).split(BATCH):
            loss = F.cross_entropy(model(inputs[index]), labels[index])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()


def by_index_fused(model: nn.Module, epochs: int) -> None:
    by_index(model, epochs, fused=True)


def by_loader(model: nn.Module, epochs: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    batches = loader()
    model.train()
    for _ in range(epochs):
        for inputs, labels in batches:
            loss = F.cross_entropy(model(inputs), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()


def fit(
    model: nn.Module, epochs: int, data: Any = DATA, frozen: int = 0, *, fused: bool = False, **options: Any
) -> Any:
    strategies = [ctl.LayerTransfer(side="input", layers=frozen)] if frozen else []
    adaptation = ctl.adapt(model, deep_copy(model), [SAME_DECAY, *strategies])
    training = ctl.Training(epochs=epochs, batch_size=BATCH, lr=LR, device="cpu", precision="fp32", fused=fused)
    return ctl.fit(adaptation, data, training=training, **options)


def fit_fused(model: nn.Module, epochs: int) -> None:
    fit(model, epochs, fused=True)


def fit_loader(model: nn.Module, epochs: int) -> None:
    fit(model, epochs, loader())


def fit_pull(model: nn.Module, epochs: int) -> None:
    adaptation = ctl.adapt(model, deep_copy(model), [SAME_DECAY, ctl.L2SP(alpha=0.01)])
    training = ctl.Training(epochs=epochs, batch_size=BATCH, lr=LR, device="cpu", precision="fp32")
    ctl.fit(adaptation, DATA, training=training)


def fit_frozen(model: nn.Module, epochs: int) -> None:
    fit(model, epochs, frozen=half(model), keep_frozen_outputs=False)


def fit_cached(model: nn.Module, epochs: int) -> None:
    if not fit(model, epochs, frozen=half(model)).kept_outputs:
        raise RuntimeError("the outputs of the frozen input side were not cached")


def half(model: nn.Module) -> int:
    return len(ctl.find_layers(model)) // 2


def accelerate_loop(model: nn.Module, epochs: int) -> None:
    from accelerate import Accelerator  # noqa: PLC0415 - may be missing

    accelerator = Accelerator(cpu=True)
    model, optimizer, batches = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=LR), loader())
    model.train()
    for _ in range(epochs):
        for inputs, labels in batches:
            loss = F.cross_entropy(model(inputs), labels)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()


def lightning_trainer(model: nn.Module, epochs: int) -> None:
    trainers.lightning_trainer(model, trainers.loss_of_pair, loader(), epochs, LR)


def transformers_trainer(model: nn.Module, epochs: int) -> None:
    trainers.transformers_trainer(model, trainers.loss_of_named, trainers.Named(*DATA), epochs, LR, batch=BATCH)


LOADER = "DataLoader loop by hand"
INDEX = "indexing loop by hand"
VARIANTS: dict[str, tuple[Variant, str | None]] = {
    LOADER: (by_loader, None),
    INDEX: (by_index, None),
    "indexing loop by hand, fused AdamW": (by_index_fused, None),
    "fit, held": (fit, None),
    "fit, held, fused AdamW": (fit_fused, None),
    "fit, held, L2-SP": (fit_pull, None),
    "fit, the same DataLoader": (fit_loader, None),
    "Accelerate loop": (accelerate_loop, "accelerate"),
    "Lightning Trainer": (lightning_trainer, "lightning"),
    "Hugging Face Trainer": (transformers_trainer, "transformers"),
    FROZEN: (fit_frozen, None),
    CACHED: (fit_cached, None),
}
RATIOS = [
    ("fit, held", INDEX, 0.98),
    ("fit, the same DataLoader", LOADER, 0.98),
    ("fit, held, fused AdamW", "indexing loop by hand, fused AdamW", None),
    ("fit, held, L2-SP", INDEX, None),
    (CACHED, FROZEN, None),
]
HELD = f"{RECORDINGS} recordings of shape {tuple(DATA[0].shape[1:])} in batches of {BATCH}."
PROBLEMS = {
    name: Problem(make, VARIANTS, LOADER, RATIOS, RECORDINGS // BATCH, HELD)
    for name, make in {"Keyword network (TC-ResNet8)": keyword_network, "Small 1-D CNN": small_cnn}.items()
} | {"Compact Conformer": CONFORMER}


def operations(make: Callable[[], nn.Module]) -> dict[str, float]:
    """Return the multiply-adds of a step in convolutions and matrix products, forward and backward."""
    torch.manual_seed(0)
    model = make()
    counts = {"all layers trained": _count(model, lambda: model(DATA[0][:BATCH]))}
    adaptation = ctl.adapt(model, deep_copy(model), [ctl.LayerTransfer(side="input", layers=half(model))])
    model.train()
    counts[FROZEN] = _count(model, lambda: model(DATA[0][:BATCH]))
    held = Held(DATA, BATCH, torch.device("cpu"), shuffle=False)
    cache = cache_frozen_prefix(model, lambda batch: model(batch[0]), adaptation.layers, adaptation.frozen, held)
    if cache is None:
        raise RuntimeError("the outputs of the frozen input side were not cached")
    cache.index = torch.arange(BATCH)
    counts[CACHED] = _count(model, lambda: model(DATA[0][:BATCH]))
    cache.remove()
    return counts


def _count(model: nn.Module, run: Callable[[], Tensor]) -> float:
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(run(), DATA[1][:BATCH]).backward()
    model.zero_grad()
    return counter.get_total_flops() / 2


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--threads", type=int, help="torch threads; default: torch's own")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="networks with such a word in their names")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    keep_freed_memory()
    file = options.out / "engine.json"
    kept = json.loads(file.read_text(encoding="utf-8"))["networks"] if options.only and file.exists() else {}
    kept = {name: part for name, part in kept.items() if "machine" in part}  # files of an earlier form have none
    chosen = [name for name in PROBLEMS if any(word.lower() in name.lower() for word in options.only or [""])]
    networks = kept | {name: measured(PROBLEMS[name], options.epochs, options.rounds) for name in chosen}
    networks = {name: networks[name] for name in PROBLEMS if name in networks}
    made = (
        "Made by `python benchmarks/engine.py`. Freed memory stays with the process, as giving pages back and taking "
        "them again falls on one loop or another by chance."
    )
    page = ["# The engine compared with other loops", "", made, ""]
    text = "\n".join([*page, *(line for name, part in networks.items() for line in table(name, part))])
    print(text)
    options.out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"networks": networks}, indent=2) + "\n", encoding="utf-8")
    file.with_suffix(".md").write_text(text, encoding="utf-8")


def measured(problem: Problem, epochs: int, rounds: int) -> dict[str, Any]:
    place = machine()
    found, missing = measure(problem, epochs, rounds)
    part = {
        "machine": place,
        "rounds": rounds,
        "epochs": epochs,
        "method": problem.method,
        "base": problem.base,
        "variants": {
            v: {"rate": summary([step for step, _ in rates])} | ratios(found, v, problem.base)
            for v, rates in found.items()
        },
        "missing": missing,
        "ratios": [
            {"of": a, "base": b, "goal": goal} | ratios(found, a, b)
            for a, b, goal in problem.ratios
            if a in found and b in found
        ],
        "in turn": [
            {"of": a, "base": b, "goal": goal, "step": in_turn(problem, a, b, epochs)}
            for a, b, goal in problem.ratios
            if goal and b in found
        ],
    }
    place["load after"] = round(os.getloadavg()[0], 2)
    if CACHED in problem.variants:
        model = problem.make()
        part["operations"] = operations(problem.make)
        part["frozen"] = f"{half(model)} of {len(ctl.find_layers(model))}"
    return part


if __name__ == "__main__":
    main()
