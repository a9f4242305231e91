"""Atomic file writing: a reader finds the old file or the new one, never a part of it."""

from __future__ import annotations

import hashlib
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from conservtl.errors import ConservtlError, WriteError

__all__ = ["TEMPORARY", "atomic_path", "file_digest", "remove_temporary", "write_bytes", "write_text"]

TEMPORARY = ".conservtl-tmp"
"""End of the names of unfinished files and folders."""
_FAILED_WRITES = ("No space left", "I/O error", "inline_container")  # the last is of torch.save


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path to write to; replace ``path`` with that file at the end of the block.

    The temporary file lies in the folder of ``path``, which is created if missing. It is flushed to disk before
    it replaces ``path``, and it gets the permissions of a normal new file. If the block raises, ``path`` stays as
    it was and the temporary file is deleted. After the block, the replacement survives a power failure.

    Raises:
        WriteError: the disk is full, or the folder is read-only or gone.
    """
    path = Path(path)
    # The same folder, because a rename across file systems is not atomic. Opened here for the mode that the
    # process's umask gives: torch and safetensors may create theirs with another.
    temporary = path.parent / f".{secrets.token_hex(8)}{TEMPORARY}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        mode = os.fstat(handle).st_mode & 0o777
        os.close(handle)
        yield temporary
        temporary.chmod(mode)
        _flush(temporary)
        temporary.replace(path)
        _flush(path.parent)
    except Exception as error:
        if not _is_of_the_disk(error):
            raise
        raise WriteError.about(path, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def remove_temporary(folder: Path, older: float = 0.0) -> None:
    """Delete the temporary files of processes that were killed while they wrote.

    Args:
        folder: nobody else writes files to it that are younger than this.
        older: least age in seconds of the files to delete.
    """
    for file in folder.glob(f".*{TEMPORARY}"):
        with suppress(OSError):
            if time.time() - file.stat().st_mtime >= older:
                file.unlink()


def _is_of_the_disk(error: Exception) -> bool:
    """Whether a write failed; safetensors and torch report that in errors of their own."""
    if isinstance(error, ConservtlError):
        return False
    return isinstance(error, OSError) or any(sign in str(error) for sign in _FAILED_WRITES)


def _flush(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folders
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_bytes(content: bytes, path: str | Path) -> None:
    """Create or replace a file atomically; its folder is created if missing. Errors are those of ``atomic_path``."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def write_text(text: str, path: str | Path) -> None:
    """Create or replace a text file atomically: UTF-8, line endings as they are in ``text``."""
    write_bytes(text.encode("utf-8"), path)


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
