"""The end of an epoch: its line in the history, its evaluations, and whether training continues."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from conservtl.engine.epoch import Learner
from conservtl.engine.evaluation import Functions, evaluate
from conservtl.engine.preparation import Sets
from conservtl.engine.selection import decides
from conservtl.engine.session import Session
from conservtl.engine.snapshot import State

__all__ = ["close_epoch", "continues", "evaluate_sets"]


def continues(learner: Learner, phases: Sequence[int]) -> bool:
    """Whether epochs are left, and the last phase has not exhausted the patience."""
    state, patience = learner.state, learner.settings.patience
    stale = patience is not None and state.selection.stale >= patience and phases[state.epoch - 1] == phases[-1]
    return state.epoch < len(phases) and not stale


def close_epoch(learner: Learner, sets: Sets, seconds: float) -> None:
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
