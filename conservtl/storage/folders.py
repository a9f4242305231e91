"""Atomic writing of folders: a reader finds all files of one writer, or none."""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

from conservtl.errors import SpecError, WriteError
from conservtl.storage.files import TEMPORARY

__all__ = ["atomic_folder", "check_replaceable"]


def check_replaceable(folder: Path, known: Sequence[str], *, overwrite: bool) -> None:
    """Raise unless a folder is new or empty, or holds files of ``known`` names (globs) alone and may be overwritten."""
    if folder.exists() and not folder.is_dir():
        raise SpecError(f"{str(folder)!r} must be a folder; it is a file. Give another name.")
    present = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    if present and not overwrite:
        raise SpecError(
            f"{str(folder)!r} must be empty or new; it holds {', '.join(present[:4])}. Give another folder, or ask "
            "for it to be overwritten (overwrite=True, --overwrite)."
        )
    if foreign := [name for name in present if not any(fnmatchcase(name, glob) for glob in known)]:
        raise SpecError(
            f"{str(folder)!r} can be overwritten if it holds nothing else; it holds {', '.join(foreign[:4])} too. Give "
            "another folder."
        )


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder to write to; put it into the place of ``folder`` at the end of the block.

    If the block raises, ``folder`` stays as it was. Where the system can exchange two folders (Linux, on most file
    systems), a process that is killed at any moment leaves the old folder or the new one in its place.

    Raises:
        WriteError: the disk is full, or the folder above is read-only.
    """
    temporary = folder.parent / f".{secrets.token_hex(8)}{TEMPORARY}"
    old = folder.parent / f".{secrets.token_hex(8)}{TEMPORARY}"
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if not folder.exists():
            temporary.rename(folder)
        elif not _exchanged(temporary, folder):
            folder.rename(old)
            temporary.rename(folder)
    except WriteError as error:
        raise WriteError(str(error).replace(str(temporary), str(folder))) from error
    except OSError as error:
        if old.exists() and not folder.exists():
            old.rename(folder)
        raise WriteError.about(folder, error) from error
    finally:
        for left in (temporary, old):
            shutil.rmtree(left, ignore_errors=True)


def _exchanged(one: Path, other: Path) -> bool:
    """Exchange two folders in one step; return whether the system can."""
    if sys.platform != "linux":
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    return rename is not None and rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0
