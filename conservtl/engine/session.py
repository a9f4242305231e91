"""Device, precision and processes: the model and its optimizer prepared by Accelerate, and put back."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from conservtl.adapt import Adaptation
from conservtl.engine.training import Training
from conservtl.errors import SpecError

__all__ = ["Session"]


class Session:
    """What a training step needs of the machine.

    Leaving it gives the model its own ``forward`` and the process its settings back.

    Args:
        adaptation: its model is moved to the device.
        training: device, precision, optimizer.
        accelerator: your own ``accelerate.Accelerator``, which then decides device and precision.
    """

    def __init__(self, adaptation: Adaptation, training: Training, accelerator: Any = None) -> None:
        self.adaptation = adaptation
        self.training = training
        self.accelerator = accelerator if accelerator is not None else _accelerator(training)
        self.device: torch.device = self.accelerator.device
        self.part: tuple[int, int] = (self.accelerator.process_index, self.accelerator.num_processes)
        self.clip = training.clip

    def __enter__(self) -> Self:
        self._deterministic = torch.are_deterministic_algorithms_enabled()
        self._training = self.adaptation.model.training
        torch.use_deterministic_algorithms(self.training.deterministic or self._deterministic)
        self.adaptation.model.to(self.device)
        cls, options = self.training.make()
        self.raw = self.adaptation.optimizer(cls, **options)
        self.model: nn.Module
        self.model, self.optimizer = self.accelerator.prepare(self.adaptation.model, self.raw)
        self.adaptation.keep_frozen()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        self.accelerator.free_memory()
        self.adaptation.model.train(self._training)
        torch.use_deterministic_algorithms(self._deterministic)

    @property
    def precision(self) -> str:
        """fp32, bf16 or fp16."""
        mixed = str(self.accelerator.mixed_precision)
        return "fp32" if mixed == "no" else mixed

    def backward(self, loss: Tensor) -> None:
        """Gradients of a loss, scaled where the precision asks for it."""
        self.accelerator.backward(loss)

    def step(self) -> None:
        """Pull and clip where clipping is on, then the optimizer's step, then no gradients."""
        if self.clip is not None:
            self.accelerator.unscale_gradients(self.optimizer)
            self.adaptation.pull(self.accelerator.scaler)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def rate(self, factor: float) -> None:
        """Schedule: each group's rate is its own times one factor."""
        for group in self.raw.param_groups:
            group["lr"] = group["initial_lr"] * factor


def _accelerator(training: Training) -> Any:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState

    cpu = training.device == "cpu" or not torch.cuda.is_available()
    if training.device == "cuda" and cpu:
        raise SpecError("training.device is cuda, but torch finds no GPU here. Set it to auto or cpu.")
    precision = training.precision
    if precision == "auto":
        precision = "bf16" if not cpu and torch.cuda.is_bf16_supported() else "fp32"
    if precision == "fp16" and cpu:
        raise SpecError("training.precision is fp16, which needs a GPU. Set it to bf16 or fp32 on a CPU.")
    mixed = "no" if precision == "fp32" else precision
    # Accelerate keeps one state a process; a run with another device or precision needs a new one.
    state = PartialState._shared_state  # noqa: SLF001
    if state and (state.get("_cpu") != cpu) and not torch.distributed.is_initialized():
        AcceleratorState._reset_state(reset_partial_state=True)  # noqa: SLF001
    else:
        AcceleratorState._reset_state()  # noqa: SLF001
    return Accelerator(mixed_precision=mixed, cpu=cpu)
