"""Executors by name, as ``--executor`` takes them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor
from functools import partial

from conservtl.errors import SpecError, hint
from conservtl.experiments.studies.executors._dask import dask_executor
from conservtl.experiments.studies.executors._processes import Processes, check_main
from conservtl.experiments.studies.executors._submitit import submitit_executor
from conservtl.experiments.studies.executors.dispatch import Workers
from conservtl.plugins import is_imported, named_callable

__all__ = ["PROCESSES", "check_executor", "check_main", "is_local", "workers_of"]

PROCESSES = "processes"

_LACKING = {
    "dask": ", without the scheduler's address. Write dask:tcp://host:8786.",
    "submitit": ", without a folder for logs. Write submitit:logs?partition=NAME.",
}
_KNOWN = "processes, dask:ADDRESS, submitit:FOLDER?partition=NAME, or module:function of a module given to --import"


def is_local(executor: str | Executor) -> bool:
    """Return whether runs are executed by processes of this machine."""
    return executor == PROCESSES


def check_executor(executor: str | Executor, processes: int) -> None:
    """Raise unless an executor can be had by its name; none is opened."""
    if processes > 1 and not is_local(executor):
        raise SpecError(
            f"processes: it is the number of processes of this machine; received {processes} with executor "
            f"{executor!r}, which has workers of its own. Leave one out."
        )
    if isinstance(executor, str):
        _opener(executor, processes)


def workers_of(executor: str | Executor, processes: int) -> Workers:
    """Return the workers of an executor by its name, or of one that the caller keeps.

    Raises:
        SpecError: the name is of none, its address does not answer, or its options are wrong.
        MissingExtraError: its library is not installed.
    """
    check_executor(executor, processes)
    if isinstance(executor, str):
        return Workers(executor, _opener(executor, processes))
    return Workers(type(executor).__name__, lambda: executor, owned=False)


def _opener(name: str, processes: int) -> Callable[[], Executor]:
    kind, _, rest = name.partition(":")
    if name == PROCESSES:
        return partial(Processes, processes)
    if kind == "dask" and rest:
        return partial(dask_executor, rest)
    if kind == "submitit" and rest:
        return partial(submitit_executor, rest)
    if kind and rest and kind not in ("dask", "submitit"):
        return partial(_own, name, kind)
    said = _LACKING.get(kind) or "." + hint(name, [PROCESSES, "dask", "submitit"])
    raise SpecError(f"executor: must be one of {_KNOWN}; received {name!r}{said}")


def _own(name: str, module: str) -> Executor:
    """Return the executor that a function of a module that was imported by hand makes."""
    if not is_imported(module):
        raise SpecError(
            f"executor {name!r}: {module} was not imported. Add --import {module.partition('.')[0]} (in Python, hand "
            f"an executor over), or name one of {_KNOWN}."
        )
    executor = named_callable(name, "executor")()
    if not isinstance(executor, Executor):
        raise SpecError(
            f"executor {name!r} must return a concurrent.futures.Executor; it returns {executor!r:.80}. Return one, or "
            "a subclass with submit and shutdown."
        )
    return executor
