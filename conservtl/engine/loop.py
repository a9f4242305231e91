"""The training loop. It knows strategies only through the plan."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from conservtl.adaptation.adaptation import Adaptation
from conservtl.engine.batching import Contents, Held, Streamed, as_batches
from conservtl.engine.checkpoint import Checkpoints, State, gather_generators, restore, snapshot
from conservtl.engine.epoch import Augment, Learner
from conservtl.engine.evaluation import Functions, Holdout, evaluate
from conservtl.engine.finalize import Ended, finish
from conservtl.engine.interruption import interruptible
from conservtl.engine.progress import Progress
from conservtl.engine.randomness import seed_all
from conservtl.engine.schedule import phase_of_epoch, total_steps
from conservtl.engine.search import Trial, run_searches
from conservtl.engine.selection import check_selection, with_criterion
from conservtl.engine.session import Session, open_session
from conservtl.engine.training import Training
from conservtl.errors import SpecError
from conservtl.functions import Forward, Loss, Metrics, accuracy, cross_entropy
from conservtl.functions import forward as plain_forward
from conservtl.layers import unwrap

__all__ = ["FitResult", "fit"]


@dataclass(frozen=True)
class FitResult:
    """What a run did.

    Args:
        history: a line an epoch: epoch, step, phase, loss, lr, seconds, the metrics of each set under its name,
            and under ``valid`` those that were selected on. Where nothing is trained one line, of epoch 0.
        steps: optimizer steps done.
        best: the best validation score, higher is better, with ``keep="path"`` that of the weights kept; None without
            a validation set or without the metric to select on.
        seconds: wall clock, with what was spent before the run was resumed.
        precision: fp32, bf16 or fp16.
        device: where it ran.
        kept_outputs: whether a frozen input side was computed once only, in some phase.
        after: what was done once training was over, by its name in the plan; under ``path`` the t that
            ``keep="path"`` chose, and the metrics on the validation parts at every point.
        path: the sets of ``path`` evaluated between the starting point (t = 0) and the trained weights (t = 1), each
            entry with t, the metrics of each set, and whether it was kept.
    """

    history: tuple[dict[str, Any], ...]
    steps: int
    best: float | None
    seconds: float
    precision: str
    device: str
    kept_outputs: bool
    after: dict[str, Any] = field(default_factory=dict)
    path: tuple[dict[str, Any], ...] = ()


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
    path: Mapping[str, Any] | None = None,
    source: Any = None,
    augment: Augment | None = None,
    keep_frozen_outputs: bool = True,
    out: str | Path | None = None,
    resume: bool = False,
    seed: int | None = None,
    progress: bool = False,
    tell: Callable[[Mapping[str, Any]], None] | None = None,
    accelerator: Any = None,
) -> FitResult:
    """Train an adaptation by its plan.

    ::

        for each epoch, in the phase the plan gives it:
            for each group of ``accumulate`` batches:
                for each batch: loss(forward(model, batch), batch) / batches in the group, backward
                pull, clip, step
            evaluate; remember the best; checkpoint; stop early
        load the best; walk the path; do what the plan asks for at the end

    Args:
        adaptation: what ``adapt`` made. Its model is trained in place and left on the device.
        train: ``Examples``, a tuple or dictionary of tensors (held on the device and batched there, where
            they fit), a dataset, a DataLoader or another iterable of batches.
        valid: {"target": data, "source": data}: what ``training.keep`` and ``patience`` select on, never a
            test part. Data as for ``train``, or a ``Holdout`` with functions of its own.
        training: settings.
        forward: (model, batch) -> outputs.
        loss: (outputs, batch) -> scalar, the mean over the batch.
        metrics: (outputs, batch) -> {name: mean over the batch, or (sum, count) to pool over the set};
            ``training.select`` names the one to select on, accuracy by default.
        watch: {"target": data, "source": data}: evaluated and shown, never selected on.
        path: the same, evaluated once training is over at 11 points between the starting point and the trained
            weights.
        source: source data, for what the plan must measure on it (a Fisher, say). Data as for ``train``.
        augment: (batch, generator) -> batch, drawn anew for each batch from that generator alone.
        keep_frozen_outputs: compute a frozen input side once, and the source model's outputs where a strategy
            compares with them, where that changes nothing but rounding: on held data, without ``augment``, with
            nothing random in it.
        out: folder for ``history.jsonl`` and ``checkpoint.pt``.
        resume: go on from the checkpoint in ``out``; on a CPU bit for bit as if never interrupted.
        seed: seeds torch, NumPy and Python first; None leaves the generators as they are.
        progress: a bar with the rate and both metrics.
        tell: called with each epoch's line of the history, for a log of your own; what it raises ends training.
        accelerator: your own ``accelerate.Accelerator``.

    Raises:
        SpecError: settings that do not fit together, or no checkpoint to resume from.
        DataError: data that is empty or of no known kind.
        TrainingDivergedError: the loss is NaN or infinite; the last good checkpoint is kept.
        KeyboardInterrupt: interrupted, after a checkpoint was written to ``out``.
    """
    begun = time.perf_counter()
    settings = training or Training()
    _check(adaptation, settings, {"valid": valid, "watch": watch, "path": path})
    functions = Functions(forward, loss, metrics)
    check_selection(settings, valid or {}, adaptation.plan, metrics)
    phases = phase_of_epoch(adaptation.plan, settings.epochs)
    folder = Path(out) if out is not None else None
    if seed is not None:
        seed_all(seed)
    with open_session(adaptation, settings, accelerator) as session:
        main = session.part[0] == 0
        store = Checkpoints(folder, main)
        batches = _training_batches(session, train)
        found = store.load() if resume else None
        if found is not None:
            adaptation.load_state_dict(found["adaptation"])  # with what was measured
        _measure(session, functions, train if session.part[1] > 1 else batches, source)
        held_out = _held_out(session, valid or {}), _held_out(session, watch or {})
        shown = _held_out(session, path or {})
        if adaptation.plan.searches:
            trial = trial_of(batches, held_out[0], functions, augment, accelerator)
            run_searches(adaptation, held_out[0], settings, batches.generators, trial)
            _measure(session, functions, train if session.part[1] > 1 else batches, source)  # what the choice asks for
        if not adaptation.plan.trained:
            return _untrained(session, functions, batches, held_out, shown, store, begun)
        session.begin()
        steps = total_steps(settings, batches.count())
        learner = Learner(session, functions, batches, steps, augment, keep_frozen_outputs)
        if found is not None:
            learner.go_on_from(restore(session, found, learner.generators, learner.augmenting))
        state = learner.state
        begun -= state.seconds

        def save(*, now: bool, gathered: Sequence[Mapping[str, Any]] = ()) -> None:
            state.seconds = time.perf_counter() - begun
            store.save(lambda: snapshot(session, state, learner.generators, gathered), now=now)

        bar = Progress(steps, state.step, shown=progress and main)
        try:
            with bar, interruptible(folder is not None) as stop:
                while _goes_on(learner, phases):
                    learner.begin(phases[state.epoch])
                    for _ in learner.epoch():
                        bar.advance()
                        if stop.asked:
                            learner.check()
                            save(now=True)
                            raise KeyboardInterrupt
                    _close(learner, *held_out, time.perf_counter() - begun)
                    bar.show(state.history[-1])
                    store.write_history(state.history)
                    gathered = gather_generators(session, learner.generators) if folder is not None else ()
                    save(now=stop.asked or not _goes_on(learner, phases), gathered=gathered)
                    if stop.asked:
                        raise KeyboardInterrupt
                    if tell is not None:
                        tell(state.history[-1])
        finally:
            learner.forget()
        if state.selection.weights is not None:
            unwrap(adaptation.model).load_state_dict(state.selection.weights)
        ended = finish(session, functions, batches, held_out[0], shown)
        return _result(session, state, ended, begun, kept_outputs=learner.ever_kept)


def trial_of(
    train: Any, valid: Mapping[str, Any], functions: Functions, augment: Augment | None, accelerator: Any
) -> Trial:
    """Return a function that trains an adaptation and returns its best validation score; arguments as for ``fit``."""

    def trial(adaptation: Adaptation, training: Training) -> float:
        result = fit(
            adaptation,
            train,
            valid,
            training,
            forward=functions.forward,
            loss=functions.loss,
            metrics=functions.metrics,
            augment=augment,
            accelerator=accelerator,
        )
        if result.best is None:
            raise RuntimeError("a trial ends with an evaluation")
        return result.best

    return trial


def _untrained(
    session: Session,
    functions: Functions,
    batches: Held | Streamed,
    held_out: tuple[Mapping[str, Holdout], Mapping[str, Holdout]],
    shown: Mapping[str, Holdout],
    store: Checkpoints,
    begun: float,
) -> FitResult:
    """The result of a plan that trains nothing: what was measured is used, what comes at the end done, no step made."""
    state = State()
    plan = session.adaptation.plan
    # Where nothing was measured either, there is no path: the model is where it started.
    ended = finish(session, functions, batches, held_out[0], shown if plan.measures else {})
    line = {"epoch": 0, "step": 0, "phase": plan.phases[0].name}
    line |= {"seconds": time.perf_counter() - begun, **_evaluated(session, functions, state, *held_out)}
    state.history.append(line)
    store.write_history(state.history)
    return _result(session, state, ended, begun, kept_outputs=False)


def _result(session: Session, state: State, ended: Ended, begun: float, *, kept_outputs: bool) -> FitResult:
    return FitResult(
        after=ended.after,
        path=ended.path,
        history=tuple(state.history),
        steps=state.step,
        best=state.selection.best if ended.best is None else ended.best,
        seconds=time.perf_counter() - begun,
        precision=session.precision,
        device=str(session.device),
        kept_outputs=kept_outputs,
    )


def _training_batches(session: Session, train: Any) -> Held | Streamed:
    if isinstance(train, DataLoader) and session.part[1] > 1:
        train = session.accelerator.prepare_data_loader(train, device_placement=False)  # each process its own part
    return as_batches(train, session.training.batch_size, session.device, shuffle=True, part=session.part)


def _measure(session: Session, functions: Functions, target: Any, source: Any) -> None:
    """Measure what the plan needs before an optimizer can be made; of many processes each on all of the data.

    Raises:
        SpecError: it needs source data, and there is none.
    """
    adaptation = session.adaptation
    for one in adaptation.bound.unmeasured():
        if one.data == "source" and source is None:
            raise SpecError(
                f"{one.by} is measured on source data ({one.describe()}), but fit was given none. Pass source=data, or "
                "choose what is measured on the target's."
            )
        adaptation.measure(
            Contents(as_batches(target if one.data == "target" else source, 64, session.device, shuffle=False)),
            on=one.data,
            forward=functions.forward,
            loss=functions.loss,
            autocast=session.autocast,
        )


def _held_out(session: Session, sets: Mapping[str, Any]) -> dict[str, Holdout]:
    """Sets to evaluate on, placed once for all evaluations."""
    found = {name: data if isinstance(data, Holdout) else Holdout(data) for name, data in sets.items()}
    return {
        name: replace(one, data=as_batches(one.data, 256, session.device, shuffle=False)) for name, one in found.items()
    }


def _goes_on(learner: Learner, phases: list[int]) -> bool:
    """Whether epochs are left, and the last phase has not gone stale."""
    state, patience = learner.state, learner.settings.patience
    stale = patience is not None and state.selection.stale >= patience and phases[state.epoch - 1] == phases[-1]
    return state.epoch < len(phases) and not stale


def _close(learner: Learner, valid: Mapping[str, Holdout], watch: Mapping[str, Holdout], seconds: float) -> None:
    """End an epoch: its line in the history, with evaluations where they are due."""
    session, settings, state = learner.session, learner.settings, learner.state
    state.epoch, state.batch = state.epoch + 1, 0
    line: dict[str, Any] = {
        "epoch": state.epoch,
        "step": state.step,
        "phase": session.adaptation.plan.phases[session.adaptation.phase].name,
        "loss": state.total / state.seen,
        "lr": max(group["lr"] for group in session.raw.param_groups),
        "seconds": seconds,
    }
    state.total, state.seen = 0.0, 0
    if state.epoch % settings.evaluate_every == 0 or state.epoch == settings.epochs:
        line |= _evaluated(session, learner.functions, state, valid, watch)
    state.history.append(line)


def _evaluated(
    session: Session,
    functions: Functions,
    state: State,
    valid: Mapping[str, Holdout],
    watch: Mapping[str, Holdout],
) -> dict[str, Any]:
    """Metrics of all sets, for a line of the history; the selection looks at those to validate on."""
    found, seen = (
        {name: evaluate(session.model, data, functions, session.device) for name, data in sets.items()}
        for sets in (valid, watch)
    )
    if not found:
        return seen
    adaptation = session.adaptation
    state.selection.look(found, adaptation.model, with_criterion(session.training, adaptation.plan))
    return found | seen | {"valid": found}


def _check(adaptation: Any, settings: Any, held_out: Mapping[str, Any]) -> None:
    if not isinstance(adaptation, Adaptation):
        raise SpecError(f"fit trains what adapt(model, source, ...) gives; received {type(adaptation).__name__}.")
    if not isinstance(settings, Training):
        raise SpecError(f"training must be a Training, such as Training(epochs=10); received {settings!r}.")
    for name, sets in held_out.items():
        if sets is not None and not isinstance(sets, Mapping):
            raise SpecError(f"{name} must name its sets: {name}={{'target': data}}; received {type(sets).__name__}.")
