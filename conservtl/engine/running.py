"""The epochs of a run: evaluations and the line in the history at the end of each, checkpoints, interruptions."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from typing import Any

from torch import Tensor

from conservtl.engine.checkpoint import Checkpoints
from conservtl.engine.epoch import Learner
from conservtl.engine.evaluation import Functions, evaluate
from conservtl.engine.interruption import Interruption, interruptible
from conservtl.engine.kept_weights import decides
from conservtl.engine.lost_workers import between_steps, worker_error
from conservtl.engine.preparation import Sets
from conservtl.engine.processes import lost_processes
from conservtl.engine.progress import Progress
from conservtl.engine.randomness import generator_states
from conservtl.engine.session import Session
from conservtl.engine.snapshot import State, gather_generators, snapshot
from conservtl.kernels.dtensor import local
from conservtl.layers import unwrap

__all__ = ["Tell", "evaluate_sets", "load_selected", "run_epochs"]


def _continues(learner: Learner, phases: Sequence[int]) -> bool:
    """Whether epochs are left, and the last phase has not exhausted the patience."""
    state, patience = learner.state, learner.settings.patience
    stale = patience is not None and state.selection.stale >= patience and phases[state.epoch - 1] == phases[-1]
    return state.epoch < len(phases) and not stale


def _close_epoch(learner: Learner, sets: Sets, seconds: float) -> None:
    """Append the epoch's line to the history, with evaluations if they are due."""
    session, settings, state = learner.session, learner.settings, learner.state
    epoch = state.epoch + 1
    total, seen = session.summed(state.total, state.seen)
    line: dict[str, Any] = {
        "epoch": epoch,
        "step": state.step,
        "phase": session.adaptation.plan.phases[session.adaptation.phase].name,
        "loss": total / seen,
        "lr": max(group["lr"] for group in session.raw.param_groups),
        "seconds": seconds,
    }
    if epoch % settings.evaluate_every == 0 or epoch == settings.epochs:
        session.average_statistics()
        with session.averaged():
            line |= evaluate_sets(session, learner.functions, state, sets)
    state.history.append(line)
    state.epoch, state.batch, state.total, state.seen = epoch, 0, 0.0, 0


def evaluate_sets(session: Session, functions: Functions, state: State, sets: Sets) -> dict[str, Any]:
    """Return the metrics of all sets for a line of the history, and update the selection by the validation sets."""
    valid, watch = (
        {
            name: evaluate(session.eager, data, functions, session.device, selects=name if selects else None)
            for name, data in each.items()
        }
        for each, selects in ((sets.valid, True), (sets.watch, False))
    )
    if not valid:
        return watch
    adaptation, settings = session.adaptation, session.training
    state.selection.look(valid, adaptation.model, settings, decides=decides(settings, adaptation.plan))
    return valid | watch | {"valid": valid}


_PERIOD = 600.0  # seconds after which many processes write a checkpoint within an epoch: a lost shard cannot be saved

Tell = Callable[[Mapping[str, Any]], None]


class _Saving:
    """Checkpoints of a run, of one process or many; ``begun`` is when it would have begun without interruptions."""

    def __init__(self, learner: Learner, store: Checkpoints, begun: float) -> None:
        self.learner, self.store, self.begun = learner, store, begun
        self._session, self._state, self._processes = learner.session, learner.state, learner.session.processes
        self._periodic = time.perf_counter() + _PERIOD

    def save(self, generators: Mapping[str, Any], gathered: Sequence[Mapping[str, Any]] = (), *, now: bool) -> None:
        """Write a checkpoint with these states of the generators, of this process and of all."""
        state, cut = self._state, self.learner.batches.cut
        state.seconds = time.perf_counter() - self.begun
        self.store.save(lambda: snapshot(self._session, state, generators, gathered, cut), now=now)

    def together(self, *, now: bool) -> None:
        """Write a checkpoint of all processes, if they agree that it is due."""
        session, state, processes, learner = self._session, self._state, self._processes, self.learner
        if not processes.many:
            return self.save(generator_states(learner.generators), now=now)
        if self.store.folder is None or not (now or processes.first(self.store.due)):
            return None
        session.average_statistics()
        gathered = gather_generators(session, learner.generators)
        own = state.total, state.seen
        state.total, state.seen = session.summed(*own)
        if processes.main:
            self.save(gathered[0], gathered, now=True)
        elif session.sharded:
            snapshot(session, state, gathered[processes.rank], (), learner.batches.cut)
        state.total, state.seen = own
        return processes.wait()  # a process that leaves earlier would seem lost

    def alone(self) -> None:
        """Write what this process has: the weights and generators after the last step that all have made."""
        if self.store.folder is not None and not self._session.sharded and self._state.step:
            self.save(self.learner.settled, now=True)

    def within_epoch(self, stop: Interruption) -> None:
        """Write a checkpoint after a step if the run is asked to stop, or many processes have written none for long."""
        late = self._processes.many and time.perf_counter() >= self._periodic
        if self.store.folder is not None:
            late = stop.agree(self._processes, late=late)
        if not (stop.asked or late):
            return
        self.learner.check()
        self.together(now=True)
        self._periodic = time.perf_counter() + _PERIOD
        if stop.asked:
            stop.stop()

    def after_failure(self, error: Exception) -> None:
        """Write a checkpoint if a process was lost, of data's workers or of the run; raise that the latter was."""
        if worker_error(error) is not None and not self._processes.many and self._state.step:
            self.save(self.learner.states(), now=True)
        if isinstance(error, RuntimeError) and (lost := lost_processes(self._processes, error)) is not None:
            if self._processes.rank == lost.first:
                self.alone()
            raise lost from error


def run_epochs(
    learner: Learner,
    phases: Sequence[int],
    sets: Sets,
    store: Checkpoints,
    bar: Progress,
    begun: float,
    tells: Sequence[Tell],
) -> None:
    """Train until the last epoch, or until the patience is exhausted."""
    state, processes, saving = learner.state, learner.session.processes, _Saving(learner, store, begun)
    try:
        with bar, interruptible(store.folder is not None, shared=processes.many) as stop:
            try:
                while _continues(learner, phases):
                    learner.begin(phases[state.epoch])
                    with closing(learner.epoch()) as steps:
                        for _ in steps:
                            bar.advance()
                            saving.within_epoch(stop)
                    with between_steps():
                        _close_epoch(learner, sets, time.perf_counter() - begun)
                    bar.show(state.history[-1])
                    store.write_history(state.history)
                    if store.folder is not None:
                        stop.agree(processes)
                    saving.together(now=stop.asked or not _continues(learner, phases))
                    if stop.asked:
                        stop.stop()
                    for tell in tells:
                        tell(state.history[-1])
            except Exception as error:
                saving.after_failure(error)
                raise
    finally:
        learner.forget()


def load_selected(session: Session, weights: Mapping[str, Tensor]) -> None:
    """Load the selected weights, of which each process has its parts."""
    model = unwrap(session.adaptation.model)
    if not session.sharded:
        model.load_state_dict(weights)
        return
    for name, tensor in model.state_dict().items():
        local(tensor).copy_(weights[name])
