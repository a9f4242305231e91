"""Checkpoints: everything a run needs to go on bit for bit, written whole or not at all."""

from __future__ import annotations

import json
import random
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conservtl.errors import SpecError

__all__ = ["Checkpoints", "Interruption", "State", "generator_states", "restore_generators"]

_OVERHEAD = 20  # a checkpoint waits this many times as long as the last one took to write


@dataclass
class State:
    """Where a run stands.

    Args:
        epoch: epochs finished.
        batch: batches of the current epoch done.
        step: optimizer steps done.
        history: a line an epoch.
        best: best validation score so far.
        weights: the weights that had it.
        stale: evaluations since.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    best: float | None = None
    weights: dict[str, Tensor] | None = None
    stale: int = 0


class Checkpoints:
    """A folder's ``checkpoint.pt`` and ``history.jsonl``.

    Args:
        folder: None keeps nothing.
        main: whether this process writes.
    """

    def __init__(self, folder: Path | None, main: bool = True) -> None:
        self.folder = folder
        self.main = main
        self._due = 0.0

    @property
    def path(self) -> Path | None:
        """Where the checkpoint is."""
        return self.folder / "checkpoint.pt" if self.folder else None

    def save(self, content: Mapping[str, Any], *, now: bool = False) -> None:
        """Write a checkpoint, unless the last one is so recent that writing would cost the run much."""
        if self.path is None or not self.main or (not now and time.perf_counter() < self._due):
            return
        begun = time.perf_counter()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        torch.save(dict(content), temporary)
        temporary.replace(self.path)
        self._due = time.perf_counter() + _OVERHEAD * (time.perf_counter() - begun)

    def load(self) -> dict[str, Any]:
        """The checkpoint to resume from.

        Raises:
            SpecError: there is none.
        """
        if self.path is None or not self.path.is_file():
            raise SpecError(f"resume: there is no checkpoint in {self.folder}. Run without resume to begin.")
        loaded: dict[str, Any] = torch.load(self.path, map_location="cpu", weights_only=True)
        return loaded

    def write_history(self, history: Sequence[Mapping[str, Any]]) -> None:
        """Write ``history.jsonl``, one line an epoch."""
        if self.folder is not None and self.main:
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary = self.folder / "history.tmp"
            temporary.write_text("".join(json.dumps(line) + "\n" for line in history), encoding="utf-8")
            temporary.replace(self.folder / "history.jsonl")


class Interruption:
    """Remembers Ctrl-C, so that a run stops between two steps with its state whole."""

    asked = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While inside, Ctrl-C is remembered; a second one acts at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.getsignal(signal.SIGINT)

        def remember(number: int, frame: Any) -> None:
            if self.asked and callable(before):
                before(number, frame)
            self.asked = True

        signal.signal(signal.SIGINT, remember)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


def generator_states() -> dict[str, Any]:
    """States of all global random generators."""
    states: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def restore_generators(states: Mapping[str, Any]) -> None:
    """Bring back what ``generator_states`` gave."""
    torch.set_rng_state(states["torch"])
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])
