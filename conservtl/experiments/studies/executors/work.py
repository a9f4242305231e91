"""A piece of work for a worker: packed here, carried out there, its errors returned as values."""

from __future__ import annotations

import contextlib
import importlib
import pickle  # of work, sent from a study to its own workers # nosec B403
import platform
import threading
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from conservtl.errors import SpecError

__all__ = ["Work", "carry_out", "dumps", "packed"]

_ONE_AT_A_TIME = threading.Lock()


class Work(Protocol):
    """Work that one worker does, and that another can take up where a lost one stopped."""

    @property
    def name(self) -> str:
        """A name for messages."""

    def run(self) -> None:
        """Do it, in the worker; results are written to the study's folder."""

    def rest(self) -> Sequence[Work]:
        """Return, in the process of the study, what a lost worker has left undone; the first was in progress."""

    def __len__(self) -> int:
        """Return the number of runs."""


def dumps(value: Any) -> bytes:
    """Return a pickle; with cloudpickle, if it is installed, functions of a notebook or a script are in it too."""
    try:
        pickler: Any = importlib.import_module("cloudpickle")
    except ImportError:
        pickler = pickle
    content: bytes = pickler.dumps(value)
    return content


def packed(work: Work) -> tuple[bytes, str, dict[str, str]]:
    """Return the arguments of ``carry_out``: plain data, which any executor can send."""
    return dumps(work), str(Path.cwd()), _versions()


def carry_out(content: bytes, folder: str, versions: Mapping[str, str]) -> Exception | None:
    """Do a piece of work in the folder that the study was started in, one piece at a time in each process.

    Random generators, threads of torch and the current folder belong to a process, not to a thread; a Dask worker may
    have many threads.

    Returns:
        None, or the error that the work raised. So an exception that an executor raises is its own: a lost worker.
    """
    try:
        with _ONE_AT_A_TIME:
            _check(folder, versions)
            with contextlib.chdir(folder):
                work: Work = pickle.loads(content)  # noqa: S301 - from the process that started the study # nosec B301
                work.run()
    except Exception as error:  # noqa: BLE001 - raised again in the study's process
        return _portable(error)
    return None


def _check(folder: str, versions: Mapping[str, str]) -> None:
    """Raise unless this worker can compute the study's results."""
    host = platform.node()
    if _versions() != versions:
        raise SpecError(
            f"executor: every worker must have the study's versions, {_shown(versions)}; {host} has "
            f"{_shown(_versions())}. Install the same there."
        )
    if not Path(folder).is_dir():
        raise SpecError(
            f"executor: every worker must see the study's files; {host} has no folder {folder!r}. Start the study in a "
            "folder that all machines share."
        )


def _versions() -> dict[str, str]:
    from conservtl import __version__

    return {"conservtl": __version__, "torch": torch.__version__}


def _shown(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _portable(error: Exception) -> Exception:
    """Return the error with its traceback as a note; one that cannot be pickled as text."""
    trace = "".join(traceback.format_exception(error))
    try:
        error.add_note(trace)
        pickle.loads(pickle.dumps(error))  # noqa: S301 - made on this line # nosec B301
    except Exception:  # noqa: BLE001 - a class of any library
        return RuntimeError(trace)
    return error
