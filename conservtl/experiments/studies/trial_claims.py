"""Trials of a shared study, claimed one at a time: as many as were asked for, whichever processes are killed."""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from conservtl.extras import require
from conservtl.storage.locks import is_locked, wait_for_lock

__all__ = ["Claims", "claims"]

_FOLDER, _PROCESS, _KILLED = "folder", "process", "killed"  # attributes of a trial
_ATTEMPTS = 3  # of a trial that kills its process, so that a search ends
_POLL = 0.5  # seconds


@contextmanager
def claims(study: Any, storage: Any, folder: Path, trials: int, say: Callable[[str], None]) -> Iterator[Claims]:
    """Yield the claims of this process on a folder's trials.

    Each process holds a lock file of its own while it lives; the operating system releases it whatever ends the
    process. So a running trial of a process whose lock is free is nobody's, at once and without a clock.
    """
    name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}.lock"
    own = folder.resolve() / ".processes" / name
    with wait_for_lock(own):
        yield Claims(study, storage, folder.resolve(), own, trials, say)
    own.unlink(missing_ok=True)  # what raised leaves it: a released lock means a trial to be repeated


class Claims:
    """What one process does to take a trial."""

    def __init__(
        self, study: Any, storage: Any, folder: Path, own: Path, trials: int, say: Callable[[str], None]
    ) -> None:
        self._study, self._storage, self._folder, self._own = study, storage, folder, own
        self._trials, self._say = trials, say
        self._states = require("optuna", "experiments").trial.TrialState

    def next(self) -> Any | None:
        """Return a trial to run; None if all are finished.

        While none is left but other processes still run theirs, wait: one of them may be killed.
        """
        waits = False
        while True:
            with wait_for_lock(self._folder / ".trials.lock"):
                self._release_killed()
                begun = [trial for trial in self._of_folder() if trial.state != self._states.WAITING]
                if len(begun) < self._trials:
                    return self._take()
            if all(trial.state.is_finished() for trial in begun):
                return None
            if not waits:
                self._say("waits for the trials that other processes run")
                waits = True
            time.sleep(_POLL)

    def _of_folder(self) -> list[Any]:
        trials = self._study.get_trials(deepcopy=False)
        return [trial for trial in trials if trial.user_attrs.get(_FOLDER) == str(self._folder)]

    def _take(self) -> Any:
        """Return a trial that waits, or a new one; it is this process's from its first moment in the storage."""
        mine = {_FOLDER: str(self._folder), _PROCESS: str(self._own)}
        if not self._study.get_trials(deepcopy=False, states=(self._states.WAITING,)):
            self._study.enqueue_trial({}, user_attrs=mine)
        trial = self._study.ask()
        for name, value in mine.items():
            if trial.user_attrs.get(name) != value:
                trial.set_user_attr(name, value)
        return trial

    def _release_killed(self) -> None:
        """Make running trials of killed processes wait again, with the parameters that they had."""
        for trial in self._study.get_trials(deepcopy=False, states=(self._states.RUNNING,)):
            process = Path(trial.user_attrs.get(_PROCESS, ""))
            if not process.name or process == self._own:
                continue
            if not process.is_file() and process.parent.parent != self._folder:
                continue  # of a folder that another machine may see
            if not is_locked(process):
                self._release(trial)
                process.unlink(missing_ok=True)

    def _release(self, trial: Any) -> None:
        study = self._storage.get_study_id_from_name(self._study.study_name)
        identity = self._storage.get_trial_id_from_study_id_trial_number(study, trial.number)
        killed = trial.user_attrs.get(_KILLED, 0) + 1
        self._storage.set_trial_user_attr(identity, _KILLED, killed)
        if killed >= _ATTEMPTS:
            self._storage.set_trial_user_attr(identity, "why", f"its process was killed {killed} times")
            self._storage.set_trial_state_values(identity, self._states.FAIL)
            self._say(f"trial {trial.number}: its process was killed {killed} times; it counts as failed")
            return
        self._storage.set_trial_user_attr(identity, _PROCESS, "")
        self._storage.set_trial_state_values(identity, self._states.WAITING)
        self._say(f"trial {trial.number}: its process was killed; it is repeated")
