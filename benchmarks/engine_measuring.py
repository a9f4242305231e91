"""Rates of training loops: measured in turn or by rounds in a random order, compared within a round."""

from __future__ import annotations

import ctypes
import datetime as dt
import importlib.metadata
import importlib.util
import os
import platform
import random
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

Variant = Callable[[nn.Module, int], None]
Found = dict[str, list[tuple[float, float]]]


@dataclass(frozen=True)
class Problem:
    """A network with the loops that train it.

    Args:
        make: builds the network.
        variants: name -> (loop of a model and epochs, package that it needs or None).
        base: the variant that all are compared with.
        ratios: (variant, compared with, goal or None).
        steps: of an epoch.
        method: what is trained, for the page.
    """

    make: Callable[[], nn.Module]
    variants: Mapping[str, tuple[Variant, str | None]]
    base: str
    ratios: list[tuple[str, str, float | None]]
    steps: int
    method: str


def steps_a_second(variant: Variant, model: nn.Module, epochs: int, steps: int) -> tuple[float, float]:
    """Return the rate of the median step, and that of the whole time from the second epoch's first step."""
    stamps: list[float] = []
    hook = model.register_forward_pre_hook(lambda *_: stamps.append(time.perf_counter()))
    torch.manual_seed(0)
    variant(model, epochs)
    hook.remove()
    stamps = stamps[-epochs * steps :][steps:]
    times = [later - earlier for earlier, later in pairwise(stamps)]
    return 1 / statistics.median(times), len(times) / sum(times)


def keep_freed_memory() -> None:
    """Let glibc keep what is freed, so that no loop pays for pages that it gives back and takes again in each step.

    Which loop does depends on the order of its tensors in memory: by chance it is one percent of a step or several.
    """
    with suppress(OSError, AttributeError):  # another library
        allocator = ctypes.CDLL(None)
        trim_threshold, map_threshold = -1, -3
        allocator.mallopt(trim_threshold, 1 << 30)
        allocator.mallopt(map_threshold, 1 << 25)


class Turns:
    """Two loops in threads of their own that make their steps in turn; a clock runs during one's own steps only."""

    def __init__(self) -> None:
        self.turn, self.running = 0, {0, 1}
        self.change = threading.Condition()
        self.steps: tuple[list[float], list[float]] = ([], [])
        self._begun = [0.0, 0.0]

    def hand_over(self, number: int) -> None:
        """End a step of a loop, and wait for the other's; called before each forward pass in training."""
        if self._begun[number]:
            self.steps[number].append(time.perf_counter() - self._begun[number])
        with self.change:
            if 1 - number in self.running:
                self.turn = 1 - number
                self.change.notify_all()
                self.change.wait_for(lambda: self.turn == number or 1 - number not in self.running)
        self._begun[number] = time.perf_counter()

    def run(self, number: int, variant: Variant, model: nn.Module, epochs: int) -> None:
        """Run a loop to its end."""
        model.register_forward_pre_hook(lambda module, _: self.hand_over(number) if module.training else None)
        try:
            variant(model, epochs)
        finally:
            with self.change:
                self.running.discard(number)
                self.change.notify_all()


def in_turn(problem: Problem, name: str, base: str, epochs: int) -> dict[str, float]:
    """Return the ratio of two variants' rates, step by step in one process: other load acts on both alike."""
    turns = Turns()
    threads = [
        threading.Thread(target=turns.run, args=(number, problem.variants[variant][0], problem.make(), epochs))
        for number, variant in enumerate((name, base))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    pairs = list(zip(*(steps[-(epochs - 1) * problem.steps :] for steps in turns.steps), strict=False))
    return summary([theirs / ours for ours, theirs in pairs])


def measure(problem: Problem, epochs: int, rounds: int) -> tuple[Found, list[str]]:
    variants = problem.variants
    missing = [name for name, (_, needs) in variants.items() if needs and not importlib.util.find_spec(needs)]
    names = [name for name in variants if name not in missing]
    found: Found = {name: [] for name in names}
    for number in range(-1, rounds):
        random.shuffle(names)
        for name in names:
            torch.manual_seed(0)
            rate = steps_a_second(variants[name][0], problem.make(), 2 if number < 0 else epochs, problem.steps)
            if number >= 0:  # the first round warms up
                found[name].append(rate)
    return {name: found[name] for name in variants if name in found}, missing


def summary(values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": middle, "low": low, "high": high}


def ratio(found: Found, name: str, base: str, column: int) -> dict[str, float]:
    return summary([a[column] / b[column] for a, b in zip(found[name], found[base], strict=True)])


def ratios(found: Found, name: str, base: str) -> dict[str, dict[str, float]]:
    return {"step": ratio(found, name, base, 0), "whole": ratio(found, name, base, 1)}


def formatted(row: dict[str, float]) -> str:
    return f"{row['median']:.3f} ({row['low']:.3f} to {row['high']:.3f})"


def machine() -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next((line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line), cpu)
    packages = ("conservtl", "torch", "accelerate", "lightning", "transformers")
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load before": round(os.getloadavg()[0], 2),
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "versions": versions,
    }
