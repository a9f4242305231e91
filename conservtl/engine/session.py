"""Device, precision and processes: a model and its optimizer, prepared by Accelerate for a run and restored."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from conservtl.adaptation.adaptation import Adaptation
from conservtl.engine.distribution import check_divisible, shard, shards, unshard
from conservtl.engine.evaluation import Functions
from conservtl.engine.execution import decide
from conservtl.engine.holding import Holding
from conservtl.engine.kept_weights import WeightAverage
from conservtl.engine.optimizer import Made
from conservtl.engine.processes import ALONE, current
from conservtl.engine.proxies import Proxies
from conservtl.engine.recomputation import Recomputation
from conservtl.engine.tracing import GRAPHS, compiled
from conservtl.engine.training import Training
from conservtl.layers import unwrap
from conservtl.losses import counted
from conservtl.plan.term import View
from conservtl.runtime.freezing import tracks_statistics
from conservtl.runtime.preserve import preserve_statistics
from conservtl.runtime.taps import ChangedOutputError
from conservtl.runtime.term_runner import OtherPass

__all__ = ["Session"]

_TORCH = ("NO", "MULTI_CPU", "MULTI_GPU", "FSDP")  # types for which gradients and steps are plain torch


class Session:
    """A model and its optimizer on the accelerator's device, for one run. ``open_session`` makes it."""

    model: nn.Module
    """Trained: prepared by Accelerate, and compiled if the settings say so."""
    eager: nn.Module
    """The same, not compiled, for evaluations."""
    raw: torch.optim.Optimizer
    average: WeightAverage | None = None
    proxies: Proxies | None = None
    """Makes the inputs on which terms compare the model with the source; None: they compare on the batches."""

    def __init__(self, adaptation: Adaptation, training: Training, accelerator: Any, made: Made | None = None) -> None:
        self.adaptation, self.training, self.accelerator = adaptation, training, accelerator
        self.made = made or training.make()
        self.device: torch.device = accelerator.device
        self.processes = current() if accelerator.num_processes > 1 else ALONE
        self.sharded = False
        self.shards = shards(training, accelerator, adaptation.model)
        self.execution = decide(training, adaptation.model, self.device, self.precision, self.made)
        if self.execution.fused:
            self.made = self.made[0], {**self.made[1], "fused": True}
        adaptation.model.to(self.device)
        self.model = self.eager = adaptation.model
        # Accelerate's step searches the file system for an optional package each time, a tenth of a millisecond.
        self._direct = str(accelerator.distributed_type.value) in _TORCH
        self._factor: float | None = None
        self.holding = Holding(training.hold, training.hold_memory)
        self.recomputation = Recomputation(unwrap(adaptation.model), training)

    def begin(self) -> None:
        """Make the optimizer and prepare it with the model, once the plan's measurements and searches are done."""
        cls, options = self.made
        if self.processes.many:
            check_divisible(self.adaptation.plan)
        if self.shards:
            shard(self.adaptation, self.device)
            self.sharded = True
        self.raw = self.adaptation.optimizer(cls, **options)
        if self.sharded:  # Accelerate would replace the parameters of the optimizer
            self.model = self.eager = self.accelerator.prepare_model(
                self.adaptation.model, device_placement=False, evaluation_mode=True
            )
        else:
            self.eager, self._prepared = self.accelerator.prepare(self.adaptation.model, self.raw)
            self.model = compiled(self.eager, self.execution.compile)
        self.adaptation.keep_frozen()
        if self.training.ema is not None:
            self.average = WeightAverage(
                self.adaptation.model, frozenset(self.adaptation.plan.trained), self.training.ema
            )

    def end(self) -> None:
        """Make sharded parameters whole again and statistics equal in all processes, once the last step is made."""
        if self.sharded:
            unshard(self.adaptation)
            self.model = self.eager = self.adaptation.model
            self.sharded, self.average = False, None
        self.average_statistics()

    def average_statistics(self) -> None:
        """Average the buffers over all processes: running statistics are then those of all their batches."""
        if self.processes.many:
            self.processes.average([one for one in unwrap(self.model).buffers() if one.is_floating_point()])

    def averaged(self) -> AbstractContextManager[None]:
        """Return a context in which the model has the averaged weights, if the settings ask for an average."""
        return nullcontext() if self.average is None else self.average.in_place()

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context that the model's forward pass runs in."""
        return self.accelerator.autocast()  # type: ignore[no-any-return]

    @property
    def precision(self) -> str:
        """fp32, bf16 or fp16."""
        return "fp32" if (mixed := str(self.accelerator.mixed_precision)) == "no" else mixed

    def train(self) -> None:
        """Put the model into training mode, and its norms into eval mode if the settings say so."""
        self.model.train()
        if self.training.batch_norm == "eval":
            for module in self.model.modules():
                if tracks_statistics(module):
                    module.eval()

    def start_phase(self, phase: int) -> None:
        """Begin a phase of the plan, in training mode."""
        self.adaptation.start_phase(phase)
        self._factor = None  # the rates have changed: the next factor is applied even if it is the same
        self.train()

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Hold a backward that no step follows: processes do not exchange gradients."""
        if self.sharded:
            model: Any = unwrap(self.model)
            model.set_requires_gradient_sync(False)
            try:
                yield
            finally:
                model.set_requires_gradient_sync(True)
        else:
            with self.accelerator.no_sync(self.model) if self.processes.many else nullcontext():
                yield

    def summed(self, *values: float) -> tuple[float, ...]:
        """Return numbers summed over all processes."""
        return tuple(map(sum, zip(*self.processes.gathered(values), strict=True)))

    def source_view(self, functions: Functions, content: Any) -> View | None:
        """Return the source model's view of the inputs that the adapted model gets, under the same autocast."""
        with self.autocast():
            return self.adaptation.source_view(content, functions.forward)

    def loss(
        self,
        functions: Functions,
        content: Any,
        source: View | None = None,
        share: float | None = None,
        terms: float | Tensor = 1.0,
        others: Any = None,
    ) -> Tensor:
        """Return the loss of a batch with the plan's terms.

        Args:
            functions: forward and loss.
            content: the batch.
            source: the source model's view of it, if it has been computed before.
            share: factor that makes the mean over processes that over all examples of their batches; None: the loss
                as it is. A loss that is a mean over positions is weighed by these instead.
            terms: factor on the plan's terms in a loss that is not shared.
            others: a batch of other inputs, on which terms compare with the source; None: on the batch itself.
        """
        outputs, loss = self._pass(functions, content)
        if source is None and others is None and self.adaptation.bound.terms.needs_source:
            source = self.source_view(functions, content)
        factor: float | Tensor | None = None
        if share is not None and self.processes.many:
            factor, terms = self._factors(counted(functions.loss, outputs, content), share)
        repeats = 1 if others is None else 2  # of the batch's pass and of the others'
        while True:
            try:
                if others is None:
                    whole = self.adaptation.loss(loss, outputs, source=source, batch=content, share=terms)
                else:
                    elsewhere = partial(self._other_pass, functions, others)
                    whole = self.adaptation.bound.objective(loss, outputs, None, content, terms, elsewhere)
                return whole if factor is None else factor * whole
            except ChangedOutputError:
                together = self.sharded or getattr(self.eager, "broadcast_buffers", False)
                if together or not repeats:  # processes make their passes together
                    raise
                repeats -= 1
                outputs, loss = self._pass(functions, content)  # what was written into is copied now

    def _other_pass(self, functions: Functions, others: Any) -> OtherPass:
        """Make a forward pass on other inputs, from which norms learn no statistics."""
        with preserve_statistics(unwrap(self.model)), self.recomputation:
            outputs = functions.forward(self.model, others)
        return outputs, self.source_view(functions, others), others

    def _pass(self, functions: Functions, content: Any) -> tuple[Any, Tensor]:
        """Return the outputs of a forward pass and their loss."""
        if self.device.type == "cuda" and self.execution.compile in GRAPHS:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        with self.recomputation:
            outputs = functions.forward(self.model, content)
        return outputs, functions.loss(outputs, content)

    def _factors(self, count: Tensor | None, share: float) -> tuple[float | Tensor, float | Tensor]:
        """Return the factor on a batch's loss, and that on its terms beside it.

        Args:
            count: positions that the loss is the mean over; None: it is the mean over examples.
            share: the factor by examples; 0 for a stand-in, which does not count.
        """
        if count is None:
            return share, 1.0
        mine = count.double() * bool(share)
        together = mine.clone()
        torch.distributed.all_reduce(together)
        factor = (mine * self.processes.world / together.clamp(min=1)).float()
        return factor, torch.where(factor > 0, share / factor, 0.0)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss, scaled in fp16."""
        scaler = self.accelerator.scaler
        if not self._direct:
            self.accelerator.backward(loss)
        elif scaler is not None:
            scaler.scale(loss).backward()
        else:
            loss.backward()  # type: ignore[no-untyped-call]

    def step(self, *, strict: bool = False) -> None:
        """Pull and clip if clipping is on, make the optimizer's step, drop the gradients.

        Args:
            strict: whether to raise if the norm to clip is not finite, where that is known without waiting for a GPU
                and is no overflow of fp16.
        """
        scaler = self.accelerator.scaler
        if self.training.clip is not None:
            self.adaptation.pull(scaler)  # unscales first
            strict &= scaler is None and self.device.type == "cpu"
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.training.clip, error_if_nonfinite=strict)
        if not self._direct:
            self._prepared.step()
        elif scaler is not None:
            scaler.step(self.raw)
            scaler.update()
        else:
            self.raw.step()
        self.raw.zero_grad()
        if self.average is not None:
            self.average.update()

    def rate(self, factor: float) -> None:
        """Set each group's rate to its initial rate times one factor."""
        if factor == self._factor:
            return
        for group in self.raw.param_groups:
            group["lr"] = group["initial_lr"] * factor
        self._factor = factor
