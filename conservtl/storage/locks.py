"""Locks on folders: one process at a time writes the results of a run or a study."""

from __future__ import annotations

import json
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from conservtl.errors import SpecError, WriteError
from conservtl.storage.files import remove_temporary

__all__ = ["check_folder", "is_locked", "lock_folder", "wait_for_lock"]

_LOCK, _OWNER = ".lock", ".lock.json"


def check_folder(folder: Path) -> None:
    """Raise if an output folder is a file."""
    if folder.exists() and not folder.is_dir():
        raise SpecError(f"out: {str(folder)!r} is a file. Give a folder.")


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold the lock of an output folder inside the block; the folder is created if missing.

    The operating system releases the lock of a process that dies, so a killed run blocks nobody. The lock file itself
    stays: another process may just be waiting for it.

    Raises:
        SpecError: it is a file, or another process holds its lock; the message names that process.
        WriteError: it cannot be created or written to.
    """
    check_folder(folder)
    try:
        lock = _acquired(folder / _LOCK, timeout=0)
    except Timeout as error:
        raise SpecError(
            f"out: {str(folder)!r} must have one writer; {_owner(folder)} writes to it. Wait for its end, or give "
            "another folder."
        ) from error
    remove_temporary(folder)
    owner = folder / _OWNER
    try:
        fields = {"process": os.getpid(), "host": socket.gethostname(), "since": f"{datetime.now(UTC):%F %T} UTC"}
        owner.write_text(json.dumps(fields), encoding="utf-8")
        yield
    finally:
        owner.unlink(missing_ok=True)
        if lock is not None:
            lock.release()


@contextmanager
def wait_for_lock(path: Path) -> Iterator[None]:
    """Wait for a lock file that processes which make the same file share, and hold it inside the block.

    The folder of the lock file is created for this user alone if missing.

    Raises:
        WriteError: the folder cannot be created or written to.
    """
    lock = _acquired(path, timeout=-1, mode=0o700)
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


def is_locked(path: Path) -> bool:
    """Return whether a process holds a lock file; on a file system without locks, whether there is one."""
    if not path.is_file():
        return False
    try:
        lock = FileLock(path, timeout=0)
        lock.acquire()
    except (Timeout, NotImplementedError):
        return True
    lock.release()
    return False


def _acquired(path: Path, timeout: float, mode: int = 0o777) -> BaseFileLock | None:
    """Return the lock, acquired; None with a warning on a file system without locks."""
    try:
        path.parent.mkdir(mode=mode, parents=True, exist_ok=True)
        lock = FileLock(path, timeout=timeout)
        lock.acquire()
    except NotImplementedError:
        warnings.warn(f"{path.parent}: this file system has no locks; let no two runs write to it.", stacklevel=4)
        return None
    except Timeout:
        raise
    except OSError as error:
        raise WriteError.about(path.parent, error) from error
    return lock


def _owner(folder: Path) -> str:
    """Return the process that holds a folder's lock, for a message."""
    try:
        fields = json.loads((folder / _OWNER).read_text(encoding="utf-8"))
        return f"process {fields['process']} on {fields['host']} (since {fields['since']})"
    except (OSError, ValueError, KeyError):
        return "another process"
