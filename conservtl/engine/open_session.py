"""Sessions from beginning to end: the model's methods and modes, and the process's settings, are left as found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.amp.grad_scaler import GradScaler

from conservtl.adaptation.adaptation import Adaptation
from conservtl.compat import ACCELERATE_ATTRIBUTES, accelerate_states, prepared_objects
from conservtl.engine.distribution import plain_environment
from conservtl.engine.execution import cpu_threads, in_tf32
from conservtl.engine.joining import join, must_join
from conservtl.engine.optimizer import Made
from conservtl.engine.processes import names_lost
from conservtl.engine.randomness import determinism
from conservtl.engine.session import Session
from conservtl.engine.stored_weights import channels_last, source_in
from conservtl.engine.training import Training
from conservtl.errors import SpecError
from conservtl.runtime.preserve import preserve_modes

__all__ = ["open_session"]


@contextmanager
def _own_accelerator(training: Training) -> Iterator[Any]:
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


def _checked_accelerator(accelerator: Any) -> Any:
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


@contextmanager
def open_session(
    adaptation: Adaptation, training: Training, accelerator: Any = None, made: Made | None = None
) -> Iterator[Session]:
    """Open a session; restore the model's methods and modes, and the settings of the process, at its end."""
    machine = _own_accelerator(training) if accelerator is None else nullcontext(_checked_accelerator(accelerator))
    with (
        machine as ready,
        determinism(training.deterministic),
        cpu_threads(None if training.threads == "auto" else training.threads),
        _preserve(adaptation, ready),
        adaptation.bound.endings.in_good_hands(),
        adaptation.bound.norms_left_to_loop(),
    ):
        session = Session(adaptation, training, ready, made)
        runner = adaptation.bound.terms.source_model
        models = [adaptation.model] if runner is None else [adaptation.model, runner.model]
        try:
            with (
                source_in(training, session.precision, runner, adaptation.plan),
                channels_last(models, active=session.execution.channels_last),
                in_tf32(session.execution.tf32),
                names_lost(session.processes),
            ):
                yield session
        finally:
            session.recomputation.close()
            adaptation.model.zero_grad()


@contextmanager
def _preserve(adaptation: Adaptation, accelerator: Any) -> Iterator[None]:
    """Restore the model's ``forward`` and modes, and the accelerator's lists of prepared objects, after the block."""
    model = adaptation.model
    names = ("forward", *ACCELERATE_ATTRIBUTES)
    attributes = {name: model.__dict__[name] for name in names if name in model.__dict__}
    prepared = [(list(objects), objects) for objects in prepared_objects(accelerator)]
    try:
        with preserve_modes(model):
            yield
    finally:
        for name in names:
            model.__dict__.pop(name, None)
        model.__dict__.update(attributes)
        for before, now in prepared:
            now[:] = before
        adaptation.keep_frozen()
