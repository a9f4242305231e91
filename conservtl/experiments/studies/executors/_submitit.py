"""A Slurm cluster as an executor, through submitit: a job for each piece of work."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Executor, Future, ThreadPoolExecutor
from typing import Any
from urllib.parse import parse_qsl

import yaml

from conservtl.errors import SpecError
from conservtl.extras import require

__all__ = ["submitit_executor"]

_DAY = 24 * 60  # minutes; submitit's own limit is 5
_MANY = 10_000  # jobs at a time, where Slurm alone bounds them
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
    return _Jobs(executor, jobs or _MANY, _POLL.get(cluster, 2.0))


def _full(name: str) -> str:
    """Return submitit's name of a parameter."""
    general = ("name", "timeout_min", "mem_gb", "nodes", "cpus_per_task", "gpus_per_node", "tasks_per_node")
    return name if name in (*general, "stderr_to_stdout") or name.startswith(("slurm_", "local_")) else f"slurm_{name}"


class _Jobs(ThreadPoolExecutor):
    """Submits jobs, each from a thread that waits for its result.

    Args:
        cluster: submitit's executor.
        limit: most jobs at a time.
        poll: seconds between two looks at a job.
    """

    def __init__(self, cluster: Any, limit: int, poll: float) -> None:
        super().__init__(limit)
        self._cluster, self._poll = cluster, poll
        self._lock, self._cancelled = threading.Lock(), threading.Event()
        self._running: list[Any] = []

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **named: Any) -> Future[Any]:
        return super().submit(self._finish, function, *arguments, **named)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End; with ``cancel_futures`` jobs that run are cancelled too, so that no repeated study meets them."""
        with self._lock:
            if cancel_futures:
                self._cancelled.set()
                for job in self._running:
                    job.cancel(check=False)
        super().shutdown(wait, cancel_futures=cancel_futures)

    def _finish(self, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        with self._lock:
            if self._cancelled.is_set():
                raise CancelledError
            job = self._cluster.submit(function, *arguments, **named)
            self._running.append(job)
        while not job.done():
            if self._cancelled.wait(self._poll):
                raise CancelledError
        with self._lock:
            self._running.remove(job)
        return job.result()
