"""Atomic file writing: a reader finds the old file or the new one, never a part of it."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["atomic_path", "write_bytes", "write_text"]


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path to write to; replace ``path`` with that file at the end of the block.

    The temporary file lies in the folder of ``path``, which is created if missing. It is flushed to disk before
    it replaces ``path``, and it gets the permissions of a normal new file. If the block raises, ``path`` stays as
    it was and the temporary file is deleted.

    Args:
        path: file to create or replace.

    Raises:
        OSError: the folder cannot be written to.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The same folder, because a rename across file systems is not atomic. Opened here for the mode that the
    # process's umask gives: torch and safetensors may create theirs with another.
    temporary = path.parent / f".{secrets.token_hex(8)}.tmp"
    handle = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        mode = os.fstat(handle).st_mode & 0o777
        os.close(handle)
        yield temporary
        temporary.chmod(mode)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(content: bytes, path: str | Path) -> None:
    """Create or replace a file atomically.

    Args:
        content: what the file holds afterwards.
        path: file to create or replace; its folder is created if missing.

    Raises:
        OSError: the folder cannot be written to; the old file is unchanged.
    """
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def write_text(text: str, path: str | Path) -> None:
    """Create or replace a text file atomically: UTF-8, line endings as they are in ``text``.

    Args:
        text: what the file holds afterwards.
        path: file to create or replace; its folder is created if missing.

    Raises:
        OSError: the folder cannot be written to; the old file is unchanged.
    """
    write_bytes(text.encode("utf-8"), path)
