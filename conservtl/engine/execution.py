"""Decisions on how a run computes: layout of images, fused optimizer, compiler, TF32, CPU threads."""

from __future__ import annotations

import functools
import inspect
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import torch
from torch import nn

from conservtl.compat import tf32_settings
from conservtl.engine.optimizer import Made, class_name
from conservtl.engine.training import Training
from conservtl.errors import SpecError, counted

__all__ = ["Execution", "ThreadTimer", "cpu_threads", "decide", "in_tf32"]

_IMAGES = (nn.Conv2d, nn.ConvTranspose2d)
_TABLES = (nn.Embedding, nn.EmbeddingBag)


@dataclass(frozen=True)
class Execution:
    """Choices by which a run computes: settings of ``Training`` without ``auto``.

    ``batch_size`` is None if the data came in batches, and ``tf32`` if it is as torch is set.
    """

    device: str
    precision: str
    channels_last: bool = False
    fused: bool = False
    compile: bool | str = False
    tf32: bool | None = None
    batch_size: int | None = None
    accumulate: int = 1
    checkpointing: bool = False
    batch_seconds: float | None = None

    def __str__(self) -> str:
        """Return the decisions in words: device, layout, fused, compiled, precision and batches."""
        mode = "" if isinstance(self.compile, bool) else f" ({self.compile})"
        batches = "" if self.batch_size is None else f"batches of {self.batch_size}"
        if self.batch_size is not None and self.batch_seconds is not None:
            batches = f"batches of at most {self.batch_seconds:.4g} s and {counted(self.batch_size, 'example')}"
        spread = f"{self.accumulate} batches a step" if self.accumulate > 1 else ""
        parts = (
            self.device,
            "channels-last" if self.channels_last else "",
            "fused" if self.fused else "",
            f"compiled{mode}" if self.compile else "",
            "tf32" if self.tf32 else "",
            self.precision,
            "checkpointing" if self.checkpointing else "",
            batches,
            spread,
        )
        return ", ".join(part for part in parts if part)

    def with_batches(self, training: Training, *, made_here: bool) -> Execution:
        """Return the decisions with the sizes of batches, once these are known."""
        size = training.batch_size if made_here and isinstance(training.batch_size, int) else None
        return replace(self, batch_size=size, accumulate=training.accumulate, batch_seconds=training.batch_seconds)


def decide(training: Training, model: nn.Module, device: torch.device, precision: str, made: Made) -> Execution:
    """Return how a run computes.

    ``auto`` is off on a CPU, where results stay those of a loop written by hand, bit for bit. On CUDA it is on where
    torch supports it: the layout for models with 2-D convolutions, the fused step for optimizers that have one, TF32
    under bf16 and fp16, whose rounding is coarser.
    """
    cuda = device.type == "cuda"
    return Execution(
        device=str(device),
        precision=precision,
        channels_last=_channels_last(training, model, cuda=cuda),
        fused=_fused(training, model, device, made),
        compile=training.compile,
        tf32=_tf32(training, precision, cuda=cuda),
        checkpointing=training.checkpointing,
    )


def _channels_last(training: Training, model: nn.Module, *, cuda: bool) -> bool:
    wanted = training.channels_last
    if wanted is False or (wanted == "auto" and not cuda):
        return False
    if any(isinstance(module, _IMAGES) for module in model.modules()):
        return True
    if wanted == "auto":
        return False
    if not any(one.ndim == 4 for one in model.parameters()):  # scripted modules and a user's own have weights alone
        raise SpecError(
            f"training.channels_last is true, which is a layout for 2-D convolutions; {type(model).__name__} has none. "
            "Set it to auto or false."
        )
    return True


def _fused(training: Training, model: nn.Module, device: torch.device, made: Made) -> bool:
    if training.fused is False or (training.fused == "auto" and device.type != "cuda"):
        return False
    cls, options = made
    reason = _no_fused(cls, options, device, model)
    if reason is not None and training.fused is True:
        raise SpecError(
            f"training.fused is true, but {class_name(cls)} makes no fused step on {device.type}: {reason}. Set it to "
            "auto or false, or use AdamW."
        )
    return reason is None


def _no_fused(cls: Any, options: dict[str, Any], device: torch.device, model: nn.Module) -> str | None:
    """Return why an optimizer has no fused step for a model; None if it has one, which trying alone shows."""
    given = getattr(cls, "keywords", {})
    if "fused" in given or given.get("foreach"):
        return "its arguments say how it steps"
    if given.get("dampening"):
        return "torch's fused step with dampening takes no parameters that are trained later than others"
    if "fused" not in inspect.signature(cls.func if isinstance(cls, functools.partial) else cls).parameters:
        return "it takes no argument fused"
    types = {one.dtype for one in model.parameters() if one.is_floating_point() or one.is_complex()}
    sparse = any(isinstance(one, _TABLES) and one.sparse for one in model.modules())
    weights = [nn.Parameter(torch.zeros(1, dtype=dtype, device=device)) for dtype in types]
    try:
        optimizer = cls(weights, **{**options, "fused": True})
        if sparse or any(map(torch.is_complex, weights)):  # at which some classes look in the step
            for one in weights:
                one.grad = torch.zeros_like(one).to_sparse() if sparse else torch.zeros_like(one)
            optimizer.step()
    except Exception as error:  # noqa: BLE001 - a class may raise anything
        return f"{error}".splitlines()[0].rstrip(".") if f"{error}" else type(error).__name__
    return None


def _tf32(training: Training, precision: str, *, cuda: bool) -> bool | None:
    if training.tf32 == "auto":
        return True if cuda and precision != "fp32" else None
    if training.tf32 and not cuda:
        raise SpecError("training.tf32 is true, which is a precision of CUDA devices; this run is on a CPU. Set it to "
                        "auto.")  # fmt: skip
    return training.tf32 if cuda else None


@contextmanager
def in_tf32(active: bool | None) -> Iterator[None]:
    """Let products and convolutions in fp32 use TF32 inside the block, or not; None: as torch is set."""
    if active is None:
        yield
        return
    settings = tf32_settings()
    before = [get() for get, _ in settings]
    try:
        for _, put in settings:
            put(active)
        yield
    finally:
        for (_, put), value in zip(settings, before, strict=True):
            put(value)


_WARM = 2  # steps of a phase that are not timed: memory is allocated, kernels are chosen
_TIMED = 5  # steps timed with one thread, and as many with all
_GAIN = 1.1  # speed-up below which further threads mostly wait


class ThreadTimer:
    """Chooses between one CPU thread and all, by timing both in turn in the first steps of a phase.

    One thread is chosen unless all are faster by a tenth. The steps are those of the run: timing costs nothing, and
    changes results by no more than the rounding of sums that are split over threads.

    Args:
        chosen: phase -> threads, filled in as they are chosen; a phase in it is not timed again.
        available: threads to choose from.
    """

    def __init__(self, chosen: dict[int, int], available: int) -> None:
        self.chosen, self._available = chosen, available
        self._phase: int | None = None

    def begin(self, phase: int) -> None:
        """Begin a phase: with the threads chosen for it, or with timing."""
        if phase == self._phase:
            return
        self._phase, self._steps = phase, 0
        self._seconds: dict[int, list[float]] = {1: [], self._available: []}
        if self._available == 1:
            self.chosen[phase] = 1
        torch.set_num_threads(self.chosen.get(phase, self._available))

    @contextmanager
    def step(self) -> Iterator[list[int]]:
        """Run a step; the block adds the sizes of the step's batches to the list."""
        sizes: list[int] = []
        if self._phase is None or self._phase in self.chosen:
            yield sizes
            return
        threads = 1 if self._steps % 2 else self._available
        torch.set_num_threads(threads)
        begun = perf_counter()
        yield sizes
        if self._steps >= _WARM:
            self._seconds[threads].append((perf_counter() - begun) / sum(sizes))  # the last batch may be smaller
        self._steps += 1
        if self._steps == _WARM + 2 * _TIMED:
            one, every = (statistics.median(self._seconds[number]) for number in (1, self._available))
            self.chosen[self._phase] = self._available if every * _GAIN < one else 1
            torch.set_num_threads(self.chosen[self._phase])


@contextmanager
def cpu_threads(threads: int | None) -> Iterator[None]:
    """Limit torch to so many CPU threads, None: as many as now, and restore their number at the end of the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
