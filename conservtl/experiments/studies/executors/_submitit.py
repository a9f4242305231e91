"""A Slurm cluster as an executor, through submitit: a job for each piece of work."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any
from urllib.parse import parse_qsl

import yaml

from conservtl.errors import SpecError
from conservtl.extras import require

__all__ = ["submitit_executor"]

_DAY = 24 * 60  # minutes; submitit's own limit is 5
_POLL = {"slurm": 2.0, "local": 0.2}  # seconds


def submitit_executor(place: str) -> Executor:
    """Return an executor that submits jobs.

    Args:
        place: ``FOLDER?partition=NAME&timeout_min=60``: a folder for logs, shared by all machines, and submitit's
            parameters; those of Slurm may leave ``slurm_`` out. ``jobs=20`` bounds the jobs at a time,
            ``cluster=local`` starts them on this machine (one a core at a time).

    Raises:
        SpecError: there is no Slurm here, or submitit knows no such parameter.
        MissingExtraError: submitit is not installed.
    """
    submitit = require("submitit", "slurm")
    folder, _, query = place.partition("?")
    if not folder:
        raise SpecError(f"executor 'submitit:{place}': submitit needs a folder for its logs. Write submitit:FOLDER?...")
    options = {key: yaml.safe_load(value) for key, value in parse_qsl(query, keep_blank_values=True)}
    cluster = options.pop("cluster", "slurm")
    jobs = options.pop("jobs", (os.cpu_count() or 1) if cluster != "slurm" else None)
    if jobs is not None and (not isinstance(jobs, int) or jobs < 1):
        raise SpecError(f"executor 'submitit:{place}': jobs must be a number from 1 up; received {jobs!r}.")
    if cluster == "slurm" and submitit.AutoExecutor.which() != "slurm":
        raise SpecError(
            f"executor 'submitit:{place}': this machine has no Slurm (no srun). Start the study where jobs are "
            "submitted, or add cluster=local to run on this machine."
        )
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
        executor.update_parameters(**{"timeout_min": _DAY} | {_full(name): value for name, value in options.items()})
    except (NameError, AssertionError, ValueError) as error:
        raise SpecError(f"executor 'submitit:{place}': {str(error).splitlines()[0]} Correct the parameter.") from error
    return _Jobs(executor, jobs, _POLL.get(cluster, 2.0))


def _full(name: str) -> str:
    """Return submitit's name of a parameter."""
    general = ("name", "timeout_min", "mem_gb", "nodes", "cpus_per_task", "gpus_per_node", "tasks_per_node")
    return name if name in (*general, "stderr_to_stdout") or name.startswith(("slurm_", "local_")) else f"slurm_{name}"


class _Jobs(Executor):
    """Futures of submitit's jobs.

    Args:
        executor: submits jobs.
        limit: most jobs at a time; None: no limit.
        poll: seconds between two looks at the jobs.
    """

    def __init__(self, executor: Any, limit: int | None, poll: float) -> None:
        self._executor, self._limit, self._poll = executor, limit, poll
        self._queue: list[tuple[Future[Any], Callable[[], Any]]] = []
        self._jobs: dict[Future[Any], Any] = {}
        self._change = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **named: Any) -> Future[Any]:
        future: Future[Any] = Future()
        with self._change:
            if self._closed:
                raise RuntimeError("the executor is shut down")
            self._queue.append((future, lambda: self._executor.submit(function, *arguments, **named)))
            self._change.notify()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End; with ``cancel_futures`` jobs that run are cancelled too, so that no repeated study meets them."""
        with self._change:
            self._closed = True
            if cancel_futures:
                for future, _ in self._queue:
                    future.cancel()
                self._queue.clear()
                for job in self._jobs.values():
                    job.cancel(check=False)
                self._jobs.clear()
            self._change.notify()
        if wait:
            self._thread.join()

    def _watch(self) -> None:
        """Submit what the limit allows and pass results on, until all is done and nothing more can come."""
        while True:
            with self._change:
                self._start()
                if not self._jobs and not self._queue:
                    if self._closed:
                        return
                    self._change.wait()
                    continue
                ended = [future for future, job in self._jobs.items() if job.done()]
            for future in ended:
                self._pass_on(future)
            if not ended:
                with self._change:
                    self._change.wait(self._poll)

    def _start(self) -> None:
        while self._queue and (self._limit is None or len(self._jobs) < self._limit):
            future, submit = self._queue.pop(0)
            if not future.set_running_or_notify_cancel():
                continue
            try:
                self._jobs[future] = submit()
            except Exception as error:  # noqa: BLE001 - sbatch refused it
                future.set_exception(error)

    def _pass_on(self, future: Future[Any]) -> None:
        job = self._jobs.pop(future, None)
        if job is None:  # cancelled meanwhile
            return
        try:
            future.set_result(job.result())
        except Exception as error:  # noqa: BLE001 - the job was killed
            future.set_exception(error)
