"""The engine on a GPU compared with hand loops and other libraries; a part of ``gpu.py``.

Each variant makes the same steps on a copy of the same network. The clock runs from one step to another, between
synchronisations, without setup. Rounds run all variants in a new random order, and ratios are formed within a round.
"""

from __future__ import annotations

import importlib.util
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import conservation as base
import torch
import trainers
from gpu_report import tried
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader, TensorDataset

import conservtl as ctl
from conservtl.layers.copying import deep_copy

LR = 1e-4
SAME_DECAY = ctl.DiscriminativeLR(groups={"*": 1.0}, decay_biases_and_norms=True)  # one group, as in the other loops
EXAMPLES = {"resnet50": ((3, 224, 224), 64), "vit_b_16": ((3, 224, 224), 64), "wav2vec2_base": ((32_000,), 16)}
"""Network -> shape of an example, and examples of a batch."""

Variant = Callable[["Problem", nn.Module], None]


@dataclass
class Problem:
    """Data in memory, and how long to train.

    Args:
        place: the device.
        shape: of an example.
        batch: examples of a batch.
        epochs: of 8 batches; the first warms up.
        lr: rate of AdamW.
    """

    place: base.Place
    shape: tuple[int, ...]
    batch: int
    epochs: int
    lr: float = LR
    data: tuple[Tensor, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        count = 8 * self.batch
        labels = torch.randint(base.CLASSES, (count,), generator=generator)
        self.data = torch.randn(count, *self.shape, generator=generator), labels

    @property
    def precision(self) -> str:
        """bf16 on a GPU, fp32 elsewhere."""
        return "bf16" if self.place.cuda else "fp32"

    def loader(self) -> DataLoader[Any]:
        """Return batches from the host's memory."""
        return DataLoader(TensorDataset(*self.data), self.batch, shuffle=True, pin_memory=self.place.cuda)

    def rate(self, variant: Variant, make: Callable[[], nn.Module]) -> dict[str, float]:
        """Return the rate, in examples a second, and the peak of memory in bytes."""
        model, steps = make(), 8 * self.epochs
        stamps: dict[int, float] = {}
        done = [0]

        def stamp(*_: Any) -> None:
            done[0] += 1
            if done[0] == 8 or done[0] > steps - 4:  # a step in fp16 may be left out
                self.place.wait()
                stamps[done[0]] = time.perf_counter()

        if self.place.cuda:
            torch.cuda.reset_peak_memory_stats()
        hook = register_optimizer_step_post_hook(stamp)
        torch.manual_seed(0)
        try:
            variant(self, model)
        finally:
            hook.remove()
        peak = torch.cuda.max_memory_allocated() if self.place.cuda else 0
        last = max(stamps)
        return {"rate": (last - 8) * self.batch / (stamps[last] - stamps[8]), "peak": peak}


class Classifier(nn.Module):
    """A model of transformers' that returns its logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        return self.model(x).logits


def build(name: str) -> nn.Module:
    if name != "wav2vec2_base":
        return base.build(name, 224)
    from transformers import Wav2Vec2Config, Wav2Vec2ForSequenceClassification  # noqa: PLC0415 - may be missing

    torch.manual_seed(0)
    config = Wav2Vec2Config(num_labels=base.CLASSES, layerdrop=0.0, apply_spec_augment=False)
    return Classifier(Wav2Vec2ForSequenceClassification(config))


def hand(*, last: bool = False, fused: bool = False, precision: str = "", compiled: bool = False,
         streamed: bool = False) -> Variant:  # fmt: skip
    """Return a loop as one would write it."""

    def run(problem: Problem, model: nn.Module) -> None:
        place = problem.place
        if last:
            model.to(memory_format=torch.channels_last)
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=fused)
        called = torch.compile(model) if compiled else model
        kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision or problem.precision)
        scaler = torch.amp.GradScaler(place.device.type, enabled=kind is torch.float16)
        layout: Any = {"memory_format": torch.channels_last} if last else {}
        model.train()
        held = None if streamed else tuple(one.to(place.device) for one in problem.data)
        for _ in range(problem.epochs):
            if held is None:
                batches: Any = problem.loader()
            else:
                order = torch.randperm(len(held[0]), device=place.device).split(problem.batch)
                batches = ((held[0][index], held[1][index]) for index in order)
            for x, y in batches:
                inputs = x.to(place.device, non_blocking=True, **layout)
                with torch.autocast(place.device.type, kind, enabled=kind is not None):
                    loss = F.cross_entropy(called(inputs), y.to(place.device, non_blocking=True))
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()

    return run


def fit(*strategies: ctl.Strategy, streamed: bool = False, precision: str = "", **settings: Any) -> Variant:
    """Return ``fit``, with its own choices of layout and step."""

    def run(problem: Problem, model: nn.Module) -> None:
        adaptation = ctl.adapt(model, deep_copy(model), [SAME_DECAY, *strategies])
        how = {"device": problem.place.device.type, "precision": precision or problem.precision, **settings}
        training = ctl.Training(epochs=problem.epochs, batch_size=problem.batch, lr=LR, **how)
        ctl.fit(adaptation, problem.loader() if streamed else problem.data, training=training)

    return run


def lightning_trainer(problem: Problem, model: nn.Module) -> None:
    cuda = problem.place.cuda
    trainers.lightning_trainer(model, trainers.loss_of_pair, problem.loader(), problem.epochs, problem.lr, cuda=cuda)


def transformers_trainer(problem: Problem, model: nn.Module) -> None:
    examples, loss = trainers.Named(*problem.data), trainers.loss_of_named
    how = {"batch": problem.batch, "cuda": problem.place.cuda}
    trainers.transformers_trainer(model, loss, examples, problem.epochs, problem.lr, **how)


def variants(model: nn.Module, *, cuda: bool, compiled: bool) -> dict[str, tuple[Variant, str | None, float | None]]:
    """Return the variants: how to run, which other to compare with, and the ratio that is wanted at least."""
    last = any(isinstance(module, nn.Conv2d) for module in model.modules())
    best = "by hand, channels-last and fused" if last else "by hand, fused"
    rows: dict[str, tuple[Variant, str | None, float | None]] = {"by hand": (hand(), None, None)}
    if last:
        rows["by hand, channels-last"] = hand(last=True), None, None
    rows[best] = hand(last=last, fused=True), None, None
    if compiled:
        rows["by hand, compiled"] = hand(last=last, fused=True, compiled=True), None, None
        rows["fit, compiled"] = fit(compile=True), "by hand, compiled", 0.98
    rows["by hand, a DataLoader"] = hand(last=last, fused=True, streamed=True), None, None
    rows["fit, held"] = fit(), best, 0.98
    rows["fit, held, L2SP"] = fit(ctl.L2SP(alpha=0.01)), "fit, held", 0.98
    rows["fit, held, L2SP decoupled"] = fit(ctl.L2SP(alpha=0.01, mode="decoupled")), "fit, held", 0.99
    rows["fit, a DataLoader"] = fit(streamed=True), "by hand, a DataLoader", 0.98
    if cuda:
        rows["by hand, fp16"] = hand(last=last, fused=True, precision="fp16"), None, None
        rows["fit, fp16"] = fit(precision="fp16"), "by hand, fp16", 0.98
    rows["Lightning Trainer"] = lightning_trainer, "fit, a DataLoader", None
    rows["Hugging Face Trainer"] = transformers_trainer, "fit, a DataLoader", None
    needs = {"Lightning Trainer": "lightning", "Hugging Face Trainer": "transformers"}
    return {name: row for name, row in rows.items() if name not in needs or importlib.util.find_spec(needs[name])}


def measured(name: str, place: base.Place, seconds: float, *, compiled: bool, tiny: nn.Module | None) -> dict[str, Any]:
    """Measure all variants of a network, in as many rounds as there is time for, one at least."""
    shape, batch = EXAMPLES[name] if tiny is None else ((3, 32, 32), 4)
    problem = Problem(place, shape, batch, 5 if tiny is None else 2)
    model = build(name) if tiny is None else tiny
    rows = variants(model, cuda=place.cuda, compiled=compiled)
    found: dict[str, list[dict[str, Any]]] = {row: [] for row in rows}
    lost: dict[str, dict[str, Any]] = {}
    ends, longest = time.perf_counter() + seconds, 0.0
    while not longest or time.perf_counter() + longest < ends:
        begun = time.perf_counter()
        left = [row for row in rows if row not in lost]
        for row in random.sample(left, len(left)):
            one = tried(partial(problem.rate, rows[row][0], lambda: deep_copy(model).to(place.device)))
            if "failed" in one:
                lost[row] = one
            else:
                found[row].append(one)
        longest = max(longest, time.perf_counter() - begun)
    rates = {row: [one["rate"] for one in found[row]] for row in rows if row not in lost}
    plain = rates.get("by hand", [])

    def line(row: str) -> dict[str, Any]:
        _, other, wanted = rows[row]
        others = rates.get(other) if other else None
        return {
            "examples a second": base.summary(rates[row]),
            "of the loop by hand": base.summary(base.quotients(rates[row], plain)) if plain else None,
            "compared with": other,
            "ratio": base.summary(base.quotients(rates[row], others)) if others else None,
            "wanted": wanted,
            "peak": max(one["peak"] for one in found[row]),
        }

    return {"batch": batch, "rounds": max(map(len, found.values())), "rows": lost | {row: line(row) for row in rates}}
