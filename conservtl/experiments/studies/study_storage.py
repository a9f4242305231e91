"""Optuna's storage of a study, by its URL."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from conservtl.errors import MissingExtraError, SpecError, WriteError
from conservtl.extras import require

__all__ = ["opened_storage", "shown_url"]

_JOURNAL = "journal:"


@contextmanager
def opened_storage(url: str) -> Iterator[Any]:
    """Open a storage, or create it; close its connections after the block.

    Args:
        url: of a database, as SQLAlchemy takes it (``sqlite:///study.db``, ``postgresql://user@host/name``), or
            ``journal:FILE``, a file that processes on many machines may share.

    Raises:
        SpecError: it is no such URL, or the database does not answer.
        WriteError: its disk is full, or its file cannot be written to; also in the block.
        MissingExtraError: the database's driver is not installed; the message names it.
    """
    if url.startswith(_JOURNAL):
        yield _journal(url)
        return
    storage = _database(url)
    try:
        yield storage
    except Exception as error:
        _check_disk(url, error)
        raise
    finally:
        storage.remove_session()
        storage.engine.dispose()


def _journal(url: str) -> Any:
    file = Path(url.removeprefix(_JOURNAL))
    if not file.name or file.is_dir():
        raise SpecError(f"tune.storage: journal: needs a file; received {url!r}. Write journal:FILE.")
    file.parent.mkdir(parents=True, exist_ok=True)
    storages = require("optuna", "experiments").storages
    return storages.JournalStorage(storages.journal.JournalFileBackend(str(file)))


def _database(url: str) -> Any:
    shown = shown_url(url)
    if "://" not in url:
        raise SpecError(
            f"tune.storage: must be the URL of a database, sqlite:///study.db for example, or journal:FILE; received "
            f"{shown!r}. Write journal:{shown} for a file."
        )
    # Many processes write to one SQLite file, each for a moment.
    more = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {}
    try:
        return require("optuna", "experiments").storages.RDBStorage(url, engine_kwargs=more)
    except MissingExtraError:
        raise
    except ImportError as error:
        driver = getattr(error.__cause__, "name", None) or "its module"
        raise MissingExtraError(
            f"tune.storage {shown!r}: the database's driver must be installed; {driver} is not. Install it with pip "
            "(psycopg[binary] for PostgreSQL), or name another driver: postgresql+psycopg://..."
        ) from error
    except Exception as error:  # of SQLAlchemy, which only Optuna imports
        _check_disk(url, error)
        reason = shown_url(str(error).strip().splitlines()[0])
        raise SpecError(
            f"tune.storage {shown!r}: the database must answer; {type(error).__name__}: {reason:.300}. Start it, or "
            "correct the URL."
        ) from error


def _check_disk(url: str, error: BaseException) -> None:
    """Raise an error that says so if SQLite could not write to its disk; Optuna hides its reason."""
    chain = [error, error.__cause__, error.__context__]
    for reason in (str(one).strip().splitlines()[0] for one in chain if str(one or "").strip()):
        if any(text in reason for text in ("disk is full", "disk I/O error", "readonly database")):
            raise WriteError.about(shown_url(url).removeprefix("sqlite:///"), OSError(reason)) from error


def shown_url(url: str) -> str:
    """Return the URL without its password."""
    return re.sub(r"(://[^:/@\s]*):[^@\s]*@", r"\1:***@", url)
