"""Random generators, seeded, saved and restored together; deterministic operations."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

__all__ = ["determinism", "generator_states", "preserve_rng", "restore_generators", "seed_all", "torch_states"]

_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


def seed_all(seed: int) -> None:
    """Seed Python, NumPy and torch on all devices."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - datasets draw from the global generator
    torch.manual_seed(seed)


def generator_states(generators: Sequence[torch.Generator] = ()) -> dict[str, Any]:
    """Return the states of the global generators and of ``generators``, in a form that a checkpoint can hold."""
    name, keys, *rest = np.random.get_state()  # noqa: NPY002
    states: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest),
        "own": [generator.get_state() for generator in generators],
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def restore_generators(states: Mapping[str, Any], generators: Sequence[torch.Generator] = ()) -> None:
    """Restore the states that ``generator_states`` returned for the same generators."""
    torch.set_rng_state(states["torch"])
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    for generator, state in zip(generators, states["own"], strict=True):
        generator.set_state(state)
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])


@contextmanager
def preserve_rng(generators: Sequence[torch.Generator] = ()) -> Iterator[None]:
    """Run a block without advancing the global random generators, nor those in ``generators``."""
    states = generator_states(generators)
    try:
        yield
    finally:
        restore_generators(states, generators)


def torch_states(device: torch.device) -> list[torch.Tensor]:
    """Return the states of the random generators that a forward pass may draw from."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


@contextmanager
def determinism(active: bool) -> Iterator[None]:
    """Refuse operations that are not deterministic inside the block, if ``active``."""
    if not active:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark, workspace = torch.backends.cudnn.benchmark, os.environ.get(_CUBLAS)
    os.environ.setdefault(_CUBLAS, ":4096:8")  # without it torch refuses every matrix product on a GPU
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.benchmark = benchmark
        if workspace is None:
            del os.environ[_CUBLAS]
