"""The epochs of a run, with its checkpoints and interruptions."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from conservtl.engine.checkpoint import Checkpoints
from conservtl.engine.epoch import Learner
from conservtl.engine.epoch_end import close_epoch, continues
from conservtl.engine.interruption import interruptible
from conservtl.engine.lost_workers import between_steps, worker_error
from conservtl.engine.preparation import Sets
from conservtl.engine.processes import lost_processes
from conservtl.engine.progress import Progress
from conservtl.engine.randomness import generator_states
from conservtl.engine.session import Session
from conservtl.engine.snapshot import gather_generators, snapshot
from conservtl.kernels.dtensor import local
from conservtl.layers import unwrap

__all__ = ["Tell", "load_selected", "run_epochs"]

_PERIOD = 600.0  # seconds after which many processes write a checkpoint within an epoch: a lost shard cannot be saved

Tell = Callable[[Mapping[str, Any]], None]


def run_epochs(
    learner: Learner,
    phases: Sequence[int],
    sets: Sets,
    store: Checkpoints,
    bar: Progress,
    begun: float,
    tells: Sequence[Tell],
) -> None:
    """Train until the last epoch, or until the patience is exhausted.

    Raises:
        KeyboardInterrupt: after Ctrl-C, once a checkpoint is written.
        Terminated: after SIGTERM, likewise.
    """
    session, state, processes = learner.session, learner.state, learner.session.processes
    cut = learner.batches.cut

    def save(generators: Mapping[str, Any], gathered: Sequence[Mapping[str, Any]], *, now: bool) -> None:
        state.seconds = time.perf_counter() - begun
        store.save(lambda: snapshot(session, state, generators, gathered, cut), now=now)

    def save_together(*, now: bool) -> None:
        """Write a checkpoint of all processes, if they agree that it is due."""
        if not processes.many:
            return save(generator_states(learner.generators), (), now=now)
        if store.folder is None or not (now or processes.first(store.due)):
            return None
        session.average_statistics()
        gathered = gather_generators(session, learner.generators)
        own = state.total, state.seen
        state.total, state.seen = session.summed(*own)
        if processes.main:
            save(gathered[0], gathered, now=True)
        elif session.sharded:
            snapshot(session, state, gathered[processes.rank], (), cut)
        state.total, state.seen = own
        return processes.wait()  # a process that leaves earlier would seem lost

    def save_alone() -> None:
        """Write what this process has: the weights and generators after the last step that all have made."""
        if store.folder is not None and not session.sharded and state.step:
            save(learner.settled, (), now=True)

    periodic = time.perf_counter() + _PERIOD
    try:
        with bar, interruptible(store.folder is not None, shared=processes.many) as stop:
            try:
                while continues(learner, phases):
                    learner.begin(phases[state.epoch])
                    for _ in learner.epoch():
                        bar.advance()
                        late = processes.many and time.perf_counter() >= periodic
                        if store.folder is not None:
                            late = stop.agree(processes, late=late)
                        if stop.asked:
                            learner.check()
                            save_together(now=True)
                            stop.stop()
                        if late:
                            learner.check()
                            save_together(now=True)
                            periodic = time.perf_counter() + _PERIOD
                    with between_steps():
                        close_epoch(learner, sets, time.perf_counter() - begun)
                    bar.show(state.history[-1])
                    store.write_history(state.history)
                    if store.folder is not None:
                        stop.agree(processes)
                    save_together(now=stop.asked or not continues(learner, phases))
                    if stop.asked:
                        stop.stop()
                    for tell in tells:
                        tell(state.history[-1])
            except Exception as error:
                if worker_error(error) is not None and not processes.many and state.step:
                    save(learner.states(), (), now=True)
                if not isinstance(error, RuntimeError):
                    raise
                lost = lost_processes(processes, error)
                if lost is None:
                    raise
                if processes.rank == lost.first:
                    save_alone()
                raise lost from error
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
