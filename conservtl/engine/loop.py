"""The training loop. It knows strategies only through the plan."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conservtl.adapt import Adaptation
from conservtl.engine.checkpoint import Checkpoints, Interruption, State, generator_states, restore_generators
from conservtl.engine.data import Batch, Held, Streamed, as_batches
from conservtl.engine.evaluate import (
    Forward,
    Functions,
    Loss,
    Metrics,
    accuracy,
    cross_entropy,
    evaluate,
    harmonic_mean,
)
from conservtl.engine.evaluate import (
    forward as plain_forward,
)
from conservtl.engine.kept import KeptOutputs, keep_outputs
from conservtl.engine.progress import Progress
from conservtl.engine.session import Session
from conservtl.engine.training import Training, schedule_factor
from conservtl.errors import SpecError, TrainingDivergedError
from conservtl.layers import unwrap
from conservtl.plan import Plan

__all__ = ["FitResult", "fit"]

_LOOK = 50  # steps between looks at the loss on a GPU; each look waits for it


@dataclass(frozen=True)
class FitResult:
    """What a run did.

    Args:
        history: a line an epoch: epoch, step, phase, loss, lr, seconds, the metrics of each set under its name,
            and under ``valid`` those that were selected on.
        steps: optimizer steps done.
        best: the validation score of the weights kept, None where the last ones are.
        seconds: wall clock.
        precision: fp32, bf16 or fp16.
        device: where it ran.
        kept_outputs: whether a frozen input side was computed once only, in some phase.
    """

    history: tuple[dict[str, Any], ...]
    steps: int
    best: float | None
    seconds: float
    precision: str
    device: str
    kept_outputs: bool


def fit(
    adaptation: Adaptation,
    train: Any,
    valid: Mapping[str, Any] | None = None,
    training: Training | None = None,
    *,
    forward: Forward = plain_forward,
    loss: Loss = cross_entropy,
    metrics: Metrics = accuracy,
    watch: Mapping[str, Any] | None = None,
    augment: Callable[[Any, torch.Generator], Any] | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    seed: int | None = None,
    progress: bool = False,
    accelerator: Any = None,
) -> FitResult:
    """Train an adaptation by its plan.

    ::

        for each epoch, in the phase the plan gives it:
            for each batch:
                loss(forward(model, batch), batch), backward
                every ``accumulate`` batches: pull, clip, step, next rate
            evaluate; remember the best; checkpoint; stop early

    Args:
        adaptation: what ``adapt`` made. Its model is trained in place and left on the device.
        train: ``Examples``, a tuple or dictionary of tensors (held on the device and batched there, where
            they fit), a dataset, a DataLoader or another iterable of batches.
        valid: {"target": data, "source": data}: what ``training.keep`` and ``patience`` select on, never a
            test part. Data as for ``train``, or a ``Holdout`` with functions of its own.
        training: settings.
        forward: (model, batch) -> outputs.
        loss: (outputs, batch) -> scalar, the mean over the batch.
        metrics: (outputs, batch) -> {name: mean over the batch}; ``accuracy`` is what is selected on, or the
            loss where there is none.
        watch: {"target": data, "source": data}: evaluated and shown, never selected on.
        augment: (batch, generator) -> batch, drawn anew for each batch from that generator alone.
        out: folder for ``history.jsonl`` and ``checkpoint.pt``.
        resume: go on from the checkpoint in ``out``; on a CPU bit for bit as if never interrupted.
        seed: seeds torch and Python first; None leaves the generators as they are.
        progress: a bar with the rate and both metrics.
        accelerator: your own ``accelerate.Accelerator``.

    Raises:
        SpecError: settings that do not fit together, or no checkpoint to resume from.
        TrainingDivergedError: the loss is NaN or infinite; the last good checkpoint is kept.
        KeyboardInterrupt: interrupted, after a checkpoint was written to ``out``.
    """
    settings = training or Training()
    functions = Functions(forward, loss, metrics)
    if seed is not None:
        _seed(seed)
    with Session(adaptation, settings, accelerator) as session:
        main = session.part[0] == 0
        batches = as_batches(train, settings.batch_size, session.device, shuffle=True, part=session.part)
        run = _Run(session, settings, functions, batches, dict(valid or {}), dict(watch or {}), augment)
        store = Checkpoints(Path(out) if out is not None else None, main)
        if resume:
            run.restore(store.load())
        bar = Progress(run.steps, shown=progress and main)
        stop = Interruption()
        with bar, stop.watching() if store.folder else nullcontext():
            run.train(store, bar, stop)
        return run.finish(store)


class _Run:
    """The state of one ``fit`` and what it acts on."""

    def __init__(
        self,
        session: Session,
        settings: Training,
        functions: Functions,
        batches: Held | Streamed,
        valid: dict[str, Any],
        watch: dict[str, Any],
        augment: Callable[[Any, torch.Generator], Any] | None,
    ) -> None:
        self.session, self.settings, self.functions = session, settings, functions
        self.batches, self.valid, self.watch, self.augment = batches, valid, watch, augment
        self.adaptation = session.adaptation
        self.state = State()
        self.begun = time.perf_counter()
        self.steps = _total_steps(settings, batches.count())
        self.phases = _phases(self.adaptation.plan, settings.epochs)
        self.generator = torch.Generator(session.device)
        if augment is not None:
            self.generator.manual_seed(int(torch.randint(2**62, ())))
        self.epoch_states = generator_states()
        self.kept: KeptOutputs | None = None
        self.ever_kept = False
        _check_selection(settings, valid)

    def train(self, store: Checkpoints, bar: Progress, stop: Interruption) -> None:
        """All epochs that are left."""
        state = self.state
        phase = None
        try:
            while state.epoch < self.settings.epochs and not self._stale():
                if self.phases[state.epoch] != phase:
                    phase = self.phases[state.epoch]
                    self._begin(phase)
                loss = self._epoch(store, bar, stop)
                state.epoch, state.batch = state.epoch + 1, 0
                self._close(loss, bar)
                self.epoch_states = generator_states()
                store.write_history(state.history)
                store.save(self.snapshot())
        finally:
            self._forget()

    def finish(self, store: Checkpoints) -> FitResult:
        """Keep the weights asked for."""
        state = self.state
        store.save(self.snapshot(), now=True)
        if state.weights is not None:
            unwrap(self.adaptation.model).load_state_dict(state.weights)
        return FitResult(
            history=tuple(state.history),
            steps=state.step,
            best=state.best,
            seconds=time.perf_counter() - self.begun,
            precision=self.session.precision,
            device=str(self.session.device),
            kept_outputs=self.ever_kept,
        )

    def _stale(self) -> bool:
        return self.settings.patience is not None and self.state.stale >= self.settings.patience

    def _begin(self, phase: int) -> None:
        """Freeze and scale as the phase says; compute a frozen input side once, where that is possible."""
        self._forget()
        self.adaptation.start_phase(phase)
        self.session.model.train()
        if isinstance(self.batches, Held) and self.augment is None and self.session.part[1] == 1:
            self.kept = keep_outputs(
                self.session.model,
                lambda content: self.functions.forward(self.session.model, content),
                self.adaptation.layers,
                self.adaptation.frozen,
                self.batches,
            )
            self.ever_kept |= self.kept is not None

    def _forget(self) -> None:
        if self.kept is not None:
            self.kept.remove()
            self.kept = None

    def _epoch(self, store: Checkpoints, bar: Progress, stop: Interruption) -> float:
        """The batches of one epoch that are left; returns their mean loss."""
        state, settings, session = self.state, self.settings, self.session
        look = 1 if session.device.type == "cpu" else _LOOK
        session.model.train()
        if settings.batch_norm == "eval":
            _hold_all(session.model)
        now = generator_states() if state.batch else None
        if now is not None:  # resumed within an epoch: its order is drawn again, then time goes on
            restore_generators(self.epoch_states)
        count = self.batches.count()
        total, seen = 0.0, 0
        losses: list[tuple[Tensor, int]] = []
        session.rate(schedule_factor(settings, state.step, self.steps))
        for batch in self.batches.epoch(skip=state.batch):
            if now is not None:
                restore_generators(now)
                now = None
            state.batch += 1
            last = state.batch == count
            share = self._share(count)
            stepping = last or state.batch % settings.accumulate == 0
            with nullcontext() if stepping else session.accelerator.no_sync(session.model):
                loss = self._loss(batch)
                losses.append((loss.detach(), batch.size))
                if len(losses) >= look:
                    total, seen = self._look(losses, total, seen)
                session.backward(loss if share == 1 else loss / share)
            if stepping:
                session.step()
                state.step += 1
                bar.advance()
                session.rate(schedule_factor(settings, state.step, self.steps))
            if stop.asked and stepping:
                store.save(self.snapshot(), now=True)
                raise KeyboardInterrupt
        if count is None and state.batch % settings.accumulate:
            session.step()
            state.step += 1
        total, seen = self._look(losses, total, seen)
        return total / max(1, seen)

    def _share(self, count: int | None) -> int:
        """Batches averaged into the step that the current batch belongs to; fewer at an epoch's end."""
        size = self.settings.accumulate
        if count is None:
            return size
        first = (self.state.batch - 1) // size * size
        return min(size, count - first)

    def _loss(self, batch: Batch) -> Tensor:
        content = batch.content if self.augment is None else self.augment(batch.content, self.generator)
        if self.kept is not None:
            self.kept.index = batch.index
        try:
            return self.functions.loss(self.functions.forward(self.session.model, content), content)
        finally:
            if self.kept is not None:
                self.kept.index = None

    def _look(self, losses: list[tuple[Tensor, int]], total: float, seen: int) -> tuple[float, int]:
        """Add up the losses since the last look; stop where one is not finite."""
        values = torch.stack([loss.float() for loss, _ in losses]).tolist() if losses else []
        for i, (value, (_, size)) in enumerate(zip(values, losses, strict=True)):
            if not math.isfinite(value):
                back = len(losses) - 1 - i
                raise TrainingDivergedError(
                    f"the loss is {value} at batch {self.state.batch - back} of epoch {self.state.epoch + 1} (step "
                    f"{self.state.step - back // self.settings.accumulate + 1}). The last good checkpoint is kept; "
                    "lower training.lr, set training.clip, or look at that batch."
                )
            total, seen = total + value * size, seen + size
        losses.clear()
        return total, seen

    def _close(self, loss: float, bar: Progress) -> None:
        """The epoch's line in the history, with evaluations where they are due."""
        state, settings = self.state, self.settings
        line: dict[str, Any] = {
            "epoch": state.epoch,
            "step": state.step,
            "phase": self.adaptation.plan.phases[self.adaptation.phase].name,
            "loss": loss,
            "lr": max(group["lr"] for group in self.session.raw.param_groups),
            "seconds": time.perf_counter() - self.begun,
        }
        if state.epoch % settings.evaluate_every == 0 or state.epoch == settings.epochs:
            found = {name: self._evaluate(data) for name, data in self.valid.items()}
            line |= found | {name: self._evaluate(data) for name, data in self.watch.items()}
            if found:
                line["valid"] = found
                self._select(found)
        state.history.append(line)
        bar.show(line)

    def _evaluate(self, data: Any) -> dict[str, float]:
        return evaluate(self.session.model, data, self.functions, self.session.device)

    def _select(self, found: Mapping[str, Mapping[str, float]]) -> None:
        """Remember the best weights, and how long ago that was."""
        state, keep = self.state, self.settings.keep
        names = ["target"] if keep == "target" or "source" not in found else ["target", "source"]
        if all("accuracy" in found[name] for name in names):
            score = harmonic_mean([found[name]["accuracy"] for name in names])
        else:
            score = -sum(found[name]["loss"] for name in names)
        if state.best is not None and score <= state.best:
            state.stale += 1
            return
        state.best, state.stale = score, 0
        if keep != "last":
            tensors = unwrap(self.adaptation.model).state_dict()
            state.weights = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}

    def snapshot(self) -> dict[str, Any]:
        """Everything that ``restore`` needs."""
        scaler = self.session.accelerator.scaler
        return {
            "state": dict(self.state.__dict__),
            "settings": self.settings.model_dump(mode="json"),
            "model": unwrap(self.adaptation.model).state_dict(),
            "adaptation": self.adaptation.state_dict(),
            "optimizer": self.session.raw.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "epoch_states": self.epoch_states,
            "states": generator_states(),
            "augment": self.generator.get_state(),
        }

    def restore(self, found: Mapping[str, Any]) -> None:
        """Go on from a snapshot.

        Raises:
            SpecError: it was made with other settings.
        """
        if found["settings"] != self.settings.model_dump(mode="json"):
            differing = [
                key
                for key, value in self.settings.model_dump(mode="json").items()
                if found["settings"].get(key) != value
            ]
            raise SpecError(f"resume: the checkpoint was made with another training.{differing[0]}. Use the same spec.")
        self.state = State(**found["state"])
        unwrap(self.adaptation.model).load_state_dict(found["model"])
        self.adaptation.load_state_dict(found["adaptation"])
        self.session.raw.load_state_dict(found["optimizer"])
        if found["scaler"] is not None:
            self.session.accelerator.scaler.load_state_dict(found["scaler"])
        self.epoch_states = found["epoch_states"]
        self.generator.set_state(found["augment"])
        restore_generators(found["states"])


def _seed(seed: int) -> None:
    import random

    random.seed(seed)
    torch.manual_seed(seed)


def _total_steps(settings: Training, count: int | None) -> int:
    if count is not None:
        return settings.epochs * math.ceil(count / settings.accumulate)
    if settings.schedule != "constant" or settings.warmup:
        raise SpecError(
            f"training.schedule is {settings.schedule}, which needs to know the number of steps, but the training data "
            "has no length. Use constant without warmup, or data with a length."
        )
    return 0


def _phases(plan: Plan, epochs: int) -> list[int]:
    """The phase of each epoch."""
    order = [n for n, phase in enumerate(plan.phases) for _ in range(phase.epochs or 0)]
    if plan.phases[-1].epochs is None:
        order += [len(plan.phases) - 1] * max(0, epochs - len(order))
    if len(order) != epochs or order[-1] != len(plan.phases) - 1:
        needed = sum(phase.epochs or 1 for phase in plan.phases)
        raise SpecError(
            f"training.epochs is {epochs}, but the plan's phases ({', '.join(p.name for p in plan.phases)}) take "
            f"{'at least ' if plan.phases[-1].epochs is None else ''}{needed}. Change one of the two."
        )
    return order


def _check_selection(settings: Training, valid: Mapping[str, Any]) -> None:
    asked = settings.keep != "last" or settings.patience is not None
    missing = [name for name in ("target", "source")[: 2 if settings.keep == "harmonic" else 1] if name not in valid]
    if asked and missing:
        raise SpecError(
            f"training.keep={settings.keep} and patience={settings.patience} look at a validation part, but "
            f"valid has no {missing[0]!r}. Carve one from the shots (data.validation), or keep the last weights."
        )


def _hold_all(model: torch.nn.Module) -> None:
    """Put every norm that tracks statistics into eval mode, for this epoch."""
    from conservtl.conserve.freeze import tracks_statistics

    for module in model.modules():
        if tracks_statistics(module):
            module.eval()
