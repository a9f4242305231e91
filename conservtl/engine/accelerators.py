"""The Accelerator of a run: one of its own, or the user's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.amp.grad_scaler import GradScaler

from conservtl.compat import accelerate_states
from conservtl.engine.distribution import plain_environment
from conservtl.engine.joining import join, must_join
from conservtl.engine.training import Training
from conservtl.errors import SpecError

__all__ = ["checked_accelerator", "own_accelerator"]


@contextmanager
def own_accelerator(training: Training) -> Iterator[Any]:
    """Yield a new Accelerator, and restore the state that Accelerate shares between all of a process."""
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs

    precision, cpu = _precision(training)
    if must_join():
        join("cpu" if cpu else "cuda")
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    shared = accelerate_states(process=not distributed)
    saved = [dict(state) for state in shared]
    for state in shared:
        state.clear()
    # Layers may be left out at random; statistics are averaged where they are read.
    wrapping = DistributedDataParallelKwargs(broadcast_buffers=False, find_unused_parameters=True)
    try:
        with plain_environment():
            made = Accelerator(
                mixed_precision="no" if precision == "fp32" else precision, cpu=cpu, kwargs_handlers=[wrapping]
            )
        if precision == "fp16" and made.device.type == "cpu":  # which Accelerate leaves in fp32
            made.native_amp, made.scaler = True, GradScaler("cpu")
        yield made
    finally:
        for state, before in zip(shared, saved, strict=True):
            state.clear()
            state.update(before)


def _precision(training: Training) -> tuple[str, bool]:
    """Return the precision, and whether to stay on the CPU."""
    cpu = training.device == "cpu" or not torch.cuda.is_available()
    if training.device == "cuda" and cpu:
        raise SpecError("training.device is cuda, but torch finds no GPU here. Set it to auto or cpu.")
    if training.precision == "auto":
        return ("bf16" if not cpu and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"), cpu
    return training.precision, cpu


def checked_accelerator(accelerator: Any) -> Any:
    """Return the accelerator unless it accumulates gradients itself, or computes otherwise than it says."""
    if (steps := accelerator.gradient_accumulation_steps) != 1:
        raise SpecError(
            f"accelerator.gradient_accumulation_steps is {steps}, but fit accumulates itself. Leave it at 1 and "
            "set training.accumulate."
        )
    if str(accelerator.mixed_precision) == "fp16" and accelerator.device.type == "cpu" and not accelerator.native_amp:
        raise SpecError(
            "accelerator.mixed_precision is fp16, which Accelerate leaves out on a CPU. Set training.precision to fp16 "
            "without an accelerator of your own, or take bf16."
        )
    return accelerator
