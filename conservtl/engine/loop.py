"""The training loop. It knows strategies only through the plan."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conservtl.adapt import Adaptation
from conservtl.engine.checkpoint import Checkpoints, State, restore, snapshot
from conservtl.engine.data import Batch, Held, Streamed, as_batches
from conservtl.engine.evaluate import Forward, Functions, Holdout, Loss, Metrics, accuracy, cross_entropy, evaluate
from conservtl.engine.evaluate import forward as plain_forward
from conservtl.engine.finite import Losses, check_weights
from conservtl.engine.interruption import Interruption, interruptible
from conservtl.engine.kept import KeptOutputs, keep_outputs
from conservtl.engine.progress import Progress
from conservtl.engine.randomness import generator_states, restore_generators, seed_all
from conservtl.engine.schedule import phase_of_epoch, schedule_factor, total_steps
from conservtl.engine.selection import check_selection
from conservtl.engine.session import Session, open_session
from conservtl.engine.training import Training
from conservtl.errors import DataError
from conservtl.layers import unwrap

__all__ = ["FitResult", "fit"]

Augment = Callable[[Any, torch.Generator], Any]


@dataclass(frozen=True)
class FitResult:
    """What a run did.

    Args:
        history: a line an epoch: epoch, step, phase, loss, lr, seconds, the metrics of each set under its name,
            and under ``valid`` those that were selected on.
        steps: optimizer steps done.
        best: the best validation score; None where nothing was validated.
        seconds: wall clock, with what was spent before the run was resumed.
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
    augment: Augment | None = None,
    keep_frozen_outputs: bool = True,
    out: str | Path | None = None,
    resume: bool = False,
    seed: int | None = None,
    progress: bool = False,
    accelerator: Any = None,
) -> FitResult:
    """Train an adaptation by its plan.

    ::

        for each epoch, in the phase the plan gives it:
            for each group of ``accumulate`` batches:
                for each batch: loss(forward(model, batch), batch) / batches in the group, backward
                pull, clip, step, next rate
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
        keep_frozen_outputs: compute a frozen input side once where that changes nothing but rounding: held data,
            no ``augment``, nothing random in it.
        out: folder for ``history.jsonl`` and ``checkpoint.pt``.
        resume: go on from the checkpoint in ``out``; on a CPU bit for bit as if never interrupted.
        seed: seeds torch, NumPy and Python first; None leaves the generators as they are.
        progress: a bar with the rate and both metrics.
        accelerator: your own ``accelerate.Accelerator``.

    Raises:
        SpecError: settings that do not fit together, or no checkpoint to resume from.
        DataError: data that is empty or of no known kind.
        TrainingDivergedError: the loss is NaN or infinite; the last good checkpoint is kept.
        KeyboardInterrupt: interrupted, after a checkpoint was written to ``out``.
    """
    settings = training or Training()
    check_selection(settings, valid or {})
    phases = phase_of_epoch(adaptation.plan, settings.epochs)
    store = Checkpoints(Path(out) if out is not None else None)
    found = store.load() if resume else None
    if seed is not None:
        seed_all(seed)
    with open_session(adaptation, settings, accelerator) as session:
        store.main = main = session.part[0] == 0
        run = _Run(session, Functions(forward, loss, metrics), train, valid or {}, watch or {}, augment)
        run.keeps = keep_frozen_outputs
        if found is not None:
            run.state = restore(session, found, run.generators)
        with (
            Progress(run.steps, run.state.step, shown=progress and main) as bar,
            interruptible(store.folder is not None) as stop,
        ):
            try:
                while run.goes_on(phases):
                    run.begin(phases[run.state.epoch])
                    run.epoch(bar, stop, store)
                    run.close(bar)
                    store.write_history(run.state.history)
                    store.save(run.snapshot, now=stop.asked or not run.goes_on(phases))
                    if stop.asked:
                        raise KeyboardInterrupt
            finally:
                run.forget()
        return run.finish()


class _Run:
    """The state of one ``fit``, what it acts on, and its steps."""

    def __init__(
        self,
        session: Session,
        functions: Functions,
        train: Any,
        valid: Mapping[str, Any],
        watch: Mapping[str, Any],
        augment: Augment | None,
    ) -> None:
        self.session, self.settings, self.functions, self.augment = session, session.training, functions, augment
        self.batches = _training_batches(session, train)
        self.valid = {name: _held_out(session, data) for name, data in valid.items()}
        self.watch = {name: _held_out(session, data) for name, data in watch.items()}
        self.state = State()
        self.steps = total_steps(self.settings, self.batches.count())
        self.generators = list(self.batches.generators)
        if augment is not None:
            self.generator = torch.Generator(session.device)
            self.generator.manual_seed(int(torch.randint(2**62, ())) + session.part[0])
            self.generators.append(self.generator)
        self.begun = time.perf_counter()
        self.phase: int | None = None
        self.keeps = True
        self.kept: KeptOutputs | None = None
        self.ever_kept = False
