"""The training loop. It reads strategies' decisions from the plan only."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from conservtl.adaptation.adaptation import Adaptation
from conservtl.engine.batch import Batches
from conservtl.engine.batch_size import find_batch_size
from conservtl.engine.checkpoint import Checkpoints
from conservtl.engine.criterion import ACCURACY, check_metric
from conservtl.engine.epoch import Augment, Learner
from conservtl.engine.evaluation import Functions
from conservtl.engine.finalize import Ended, finish
from conservtl.engine.first_batches import check_first_batches
from conservtl.engine.fit_result import FitResult
from conservtl.engine.kept_weights import check_selection
from conservtl.engine.lost_workers import named_worker_errors
from conservtl.engine.mixing import with_mixing
from conservtl.engine.open_session import open_session
from conservtl.engine.optimizer import choose_optimizer
from conservtl.engine.preparation import (
    Sets,
    check_arguments,
    check_compiler,
    learn_labels,
    make_measurements,
    part_generators,
    place_sets,
    training_batches,
    with_sizes,
)
from conservtl.engine.progress import Progress, ShowMetric, Tracker, show_plainly, tracking
from conservtl.engine.proxies import Proxies, check_proxies
from conservtl.engine.randomness import seed_all
from conservtl.engine.resizing import resized
from conservtl.engine.running import Tell, evaluate_sets, load_selected, run_epochs
from conservtl.engine.schedule import phase_of_epoch, total_steps
from conservtl.engine.search import Trial, run_searches
from conservtl.engine.session import Session
from conservtl.engine.snapshot import State, restore
from conservtl.engine.stored_weights import unused_half
from conservtl.engine.streamed import Streamed
from conservtl.engine.training import Training
from conservtl.functions import Forward, Loss, Metrics, accuracy, cross_entropy
from conservtl.functions import forward as plain_forward
from conservtl.losses import check_trained

__all__ = ["fit", "trial_of"]


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
    proxies: Augment | None = None,
    optimizer: Any = None,
    keep_frozen_outputs: bool = True,
    out: str | Path | None = None,
    resume: bool = False,
    seed: int | None = None,
    progress: bool | ShowMetric = False,
    tell: Tell | None = None,
    log: Tracker | Sequence[Tracker] | None = None,
    accelerator: Any = None,
) -> FitResult:
    """Train an adaptation by its plan.

    ::

        for each epoch, in the phase the plan gives it:
            for each group of ``accumulate`` batches:
                for each batch: loss(forward(model, batch), batch) / batches in the group, backward
                pull, clip, step
            evaluate; record the best; checkpoint; stop early
        load the best; evaluate the path; carry out the plan's "after" decisions

    Args:
        adaptation: result of ``adapt``. Its model is trained in place and left on the device.
        train: ``Examples``, a tuple or dictionary of tensors or NumPy arrays (held on the device and batched there if
            they fit), a dataset, a DataLoader or another iterable of batches.
        valid: {"target": data, "source": data}: sets that ``training.keep`` and ``patience`` select on, never a test
            part. Data as for ``train``, or a ``Holdout`` with functions of its own.
        training: settings; None: those handed to ``adapt`` in a recipe, or else the defaults.
        forward: (model, batch) -> outputs.
        loss: (outputs, batch) -> scalar, the mean over the batch; or a loss of torch, such as
            ``nn.CrossEntropyLoss(label_smoothing=0.1)`` or ``nn.MSELoss()``, which gets the logits and labels.
        metrics: (outputs, batch) -> {name: mean over the batch, or (sum, count) to pool over the set};
            ``training.select`` names the one to select on, accuracy by default. The default metric is the accuracy
            of logits (N, classes) and integer labels (N,); for other outputs or labels the loss is selected on.
        watch: {"target": data, "source": data}: evaluated and shown, never selected on.
        path: the same, evaluated after training at 11 points between the starting point and the trained weights.
        source: source data, for measurements on it such as a Fisher. Data as for ``train``.
        augment: (batch, generator) -> batch, drawn anew for each batch from that generator alone.
        proxies: (batch, generator) -> batch of inputs unlike the examples, such as other voices, perhaps of other
            lengths. Strategies that compare the model with the source compare on these in the place of the batch, so
            that the source's behaviour is kept there while the task's loss learns the examples. Made of each batch
            before ``augment``; costs a second forward and backward pass, from which norms learn no statistics.
        optimizer: an optimizer class, such as ``torch.optim.RMSprop``, or a ``functools.partial`` of one with its other
            arguments, in the place of ``training.optimizer``; ``training.lr`` is its rate.
        keep_frozen_outputs: whether to compute a frozen input side, and the source model's outputs that a strategy
            compares with, only once, if that changes nothing but rounding: on held data, without ``augment`` or
            ``proxies``, without random layers in the input side.
        out: folder for ``history.jsonl`` and ``checkpoint.pt``.
        resume: whether to continue from the checkpoint in ``out``; on a CPU bit for bit as if never interrupted.
        seed: seed of torch, NumPy and Python; None leaves the generators as they are.
        progress: whether to show a bar with steps per second and the metrics; a function (metric, value) -> text
            shows it and writes the metrics.
        tell: called with each epoch's line of the history, for a log; an exception that it raises ends training.
        log: experiment trackers of Accelerate that get each epoch's numbers at its step: ``"tensorboard"`` (files in
            ``out``), ``"wandb"``, ``"mlflow"``, others by name, a ``GeneralTracker``, or several in a list; None:
            ``training.log``.
        accelerator: an ``accelerate.Accelerator`` to use instead of a new one; its own trackers (``log_with``) get the
            numbers.

    Raises:
        SpecError: settings contradict each other, outputs, labels, loss and metrics do not fit each other, a metric to
            select on is missing, or there is no checkpoint. All of this is found before the first step.
        DataError: data is empty or of an unknown kind.
        TrainingDivergedError: the loss is NaN or infinite, in training or on a set of ``valid``; the last good
            checkpoint is kept.
        LostWorkerError: a process that loads data was killed, after a checkpoint was written to ``out``.
        WriteError: a checkpoint cannot be written; the one before is unchanged.
        KeyboardInterrupt: on Ctrl-C, after a checkpoint was written to ``out``.
        Terminated: on SIGTERM, likewise.

    Example:
        >>> import torch, conservtl as ctl
        >>> source, model = torch.nn.Linear(4, 2), torch.nn.Linear(4, 2)
        >>> adaptation = ctl.adapt(model, source, [ctl.L2SP(alpha=0.1)])
        >>> inputs, labels = torch.randn(32, 4), torch.randint(2, (32,))
        >>> held_out = {"target": (inputs[24:], labels[24:])}
        >>> training = ctl.Training(epochs=2, keep="target", device="cpu")
        >>> ctl.fit(adaptation, (inputs[:24], labels[:24]), held_out, training, seed=0).steps
        2
    """
    begun = time.perf_counter()
    settings = training or adaptation.training or Training()
    sets_given = {"valid": valid, "watch": watch, "path": path}
    check_arguments(adaptation, settings, sets_given, seed=seed, out=out, accelerator=accelerator)
    check_proxies(proxies)
    adaptation.bound.plan = adaptation.plan.with_proxies(proxies is not None)
    made = choose_optimizer(settings, optimizer, recommended=training is None)
    functions = Functions(forward, loss, metrics)
    check_trained(functions.loss, adaptation.model.parameters())
    check_selection(settings, valid or {}, adaptation.plan, metrics)
    phases = phase_of_epoch(adaptation.plan, settings.epochs)
    if seed is not None:
        seed_all(seed)
    folder = Path(out) if out is not None else None
    with (
        named_worker_errors(),
        open_session(adaptation, settings, accelerator, made) as session,
        tracking(session, (settings.log or None) if log is None else log, folder, accelerator) as track,
    ):
        if proxies is not None:
            session.proxies = Proxies(proxies, session.device, session.processes)
        main = session.processes.main
        store = Checkpoints(folder, main)
        saved = store.load() if resume else None
        if saved is not None:
            session.training = with_sizes(settings, saved["settings"])
        if saved is not None and settings.batch_size == "auto":
            batches = resized(session, train)
        else:
            batches = training_batches(session, train, None if saved is None else saved.get("batch"))
        if saved is not None:
            adaptation.load_state_dict(saved["adaptation"])  # with its measurements and choices
        sets = place_sets(session, valid, watch, path)
        learn_labels(session, functions, batches)
        check_first_batches(session, functions, batches, {"valid": sets.valid, "watch": sets.watch, "path": sets.path})
        check_compiler(session, functions, batches)
        measured = train if session.processes.many else batches
        make_measurements(session, functions, measured, source)
        if adaptation.plan.searches:
            again = train if settings.batch_size == "auto" and isinstance(batches, Streamed) else batches
            trial = trial_of(again, sets.valid, functions, augment, accelerator, optimizer, proxies)
            run_searches(adaptation, sets.valid, settings, batches.generators, trial)
            make_measurements(session, functions, measured, source)  # those that the choice needs
        if not adaptation.plan.trained:
            return _untrained(session, functions, batches, sets, store, begun)
        if saved is None:
            batches = find_batch_size(session, functions, train, batches)
        session.begin()
        steps = total_steps(session.training, batches.step_count(session.training.accumulate))
        mixed = with_mixing(session, functions, batches, augment)
        learner = Learner(session, functions, batches, steps, mixed, keep_frozen_outputs)
        part_generators(session, batches)
        if saved is not None:
            learner.go_on_from(restore(session, saved, learner.generators, learner.augmenting))
        begun -= learner.state.seconds
        show = progress if callable(progress) else show_plainly
        bar = Progress(steps, learner.state.step, shown=bool(progress) and main, show=show)
        run_epochs(learner, phases, sets, store, bar, begun, [each for each in (track, tell) if each is not None])
        if learner.state.selection.weights is not None:
            load_selected(session, learner.state.selection.weights)
        elif session.average is not None:
            session.average.apply()
        session.end()
        ended = finish(session, functions, batches, sets.valid, sets.path)
        store.end()
        return _result(session, batches, learner.state, ended, begun, kept_outputs=learner.ever_cached)


def _untrained(
    session: Session,
    functions: Functions,
    batches: Batches,
    sets: Sets,
    store: Checkpoints,
    begun: float,
) -> FitResult:
    """Return the result of a plan that trains nothing: measurements are used and the end is done, without a step."""
    state = State()
    plan = session.adaptation.plan
    # Without measurements there is no path either: the model is at its starting point.
    ended = finish(session, functions, batches, sets.valid, sets.path if plan.measures else {})
    line = {"epoch": 0, "step": 0, "phase": plan.phases[0].name}
    line |= {"seconds": time.perf_counter() - begun, **evaluate_sets(session, functions, state, sets)}
    state.history.append(line)
    store.write_history(state.history)
    return _result(session, batches, state, ended, begun, kept_outputs=False)


def trial_of(
    train: Any,
    valid: Mapping[str, Any],
    functions: Functions,
    augment: Augment | None,
    accelerator: Any,
    optimizer: Any = None,
    proxies: Augment | None = None,
) -> Trial:
    """Return a function that trains an adaptation and returns its best validation score; arguments as for ``fit``."""

    def trial(adaptation: Adaptation, training: Training) -> float:
        result = fit(
            adaptation,
            train,
            valid,
            training.model_copy(update={"log": ()}),
            forward=functions.forward,
            loss=functions.loss,
            metrics=functions.metrics,
            augment=augment,
            proxies=proxies,
            accelerator=accelerator,
            optimizer=optimizer,
        )
        if result.best is None:
            check_metric(ACCURACY, result.history[-1]["valid"]["target"], "target")
            raise RuntimeError("a trial ends with an evaluation")
        return result.best

    return trial


def _result(
    session: Session, batches: Batches, state: State, ended: Ended, begun: float, *, kept_outputs: bool
) -> FitResult:
    """Return the result of a run that began at ``begun``."""
    execution = str(session.execution.with_batches(session.training, made_here=batches.sized))
    unused = unused_half(session.training, session.precision, session.adaptation.bound.terms.source_model)
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
        execution=", ".join([execution, unused] if unused else [execution]),
    )
