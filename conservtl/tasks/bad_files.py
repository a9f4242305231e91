"""Files of a data set that cannot be used: refused, or skipped with a count and a list."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from conservtl.errors import DataError, counted
from conservtl.spec_model import FrozenModel
from conservtl.tasks.file_listing import is_text

__all__ = [
    "FileData",
    "FolderFiles",
    "OnBad",
    "bad_among",
    "check_files",
    "explained",
    "fault_of",
    "names_below",
    "refuse",
    "shown_name",
    "skipped_report",
    "skipped_text",
]

OnBad = Literal["error", "skip"]
"""Whether a bad file ends the run before training, or is left out and listed."""

_LISTED = 3  # files that a message names
_REPORTED = 100  # files that a report lists
_REASON = 300  # characters of a reason
_REMEMBERED = 1_000_000  # files whose check is not repeated in this process
_checked: dict[tuple[Any, ...], str | None] = {}


class FileData(FrozenModel):
    """Fields of a ``data`` section whose examples are files."""

    on_bad: OnBad = "error"
    """Files that cannot be used (damaged, empty, silent, a decompression bomb, a link out of the folder): `error`
    refuses the run, `skip` leaves them out and lists them in plan and report. Every file is read before the split."""


class FolderFiles(FileData):
    """Fields of a ``data`` section whose examples are the files below a folder."""

    follow_links: bool = False
    """Whether links may lead out of the folder. Links in circles are bad files either way."""


def refuse(bad: Mapping[Path, str]) -> None:
    """Raise if a file is bad: name the first in order, and count the others."""
    if bad:
        file = min(bad)
        more = f"; {counted(len(bad) - 1, 'other', 'is')} bad too" if len(bad) > 1 else ""
        raise DataError(
            f"{shown_name(file)} {bad[file]}{more}. Replace or remove it, or leave bad files out with data.on_bad: "
            "skip."
        )


def bad_among(
    data: FileData, listed: Mapping[Path, str], files: Iterable[Path], read: Callable[[Path], object], kind: str
) -> dict[Path, str]:
    """Return the files to leave out and why: those known to be bad, and those that reading finds, whatever the draw.

    ``kind`` is as for ``check_files``.
    """
    bad = {**listed, **check_files(files, read, kind)}
    if data.on_bad == "error":
        refuse(bad)
    return bad


def check_files(files: Iterable[Path], read: Callable[[Path], object], kind: str | None = None) -> dict[Path, str]:
    """Read files one by one; return those that cannot be used, and why.

    With a ``kind``, a file is read once in a process as long as its size and time stay the same.
    """
    bad = {}
    for file in files:
        key = (kind, str(file), *_state(file))
        reason = _checked[key] if kind is not None and key in _checked else fault_of(file, read)
        if kind is not None and len(_checked) < _REMEMBERED:
            _checked[key] = reason
        if reason is not None:
            bad[file] = reason
    return bad


def fault_of(item: object, read: Callable[[Any], object]) -> str | None:
    """Return why a file or an image of a set cannot be used: the rule of the ``DataError`` that reading it raises."""
    try:
        read(item)
    except DataError as error:
        rule, _, _fix = str(error).rpartition(". ")
        return (rule or str(error)).removeprefix(shown_name(item)).replace(shown_name(item), "it").strip()[:_REASON]
    return None


def names_below(root: Path, bad: Mapping[Path, str]) -> dict[str, str]:
    """Return bad files by their names below a folder, as text that UTF-8 can hold, in order."""
    return {_name_below(root, file): bad[file] for file in sorted(bad)}


def _name_below(root: Path, file: Path) -> str:
    name = file.relative_to(root).as_posix() if file.is_relative_to(root) else file.as_posix()
    return name if is_text(name) else ascii(name)


def skipped_text(skipped: Mapping[str, str], count: int | None = None) -> str:
    """Return how many files are skipped, those listed or ``count`` of them, and the first of them with why."""
    count = len(skipped) if count is None else count
    names = sorted(skipped)[:_LISTED]
    shown = "; ".join(f"{shown_name(name)} {shown_name(skipped[name])}" for name in names)
    more = f"; and {count - len(names):,} more" if count > len(names) else ""
    return f"{counted(count, 'file', 'is')} skipped: {shown}{more}"


def skipped_report(skipped: Mapping[str, str]) -> dict[str, Any]:
    """Return how many files are skipped, and the first of them with why, as JSON."""
    files = [{"file": name, "reason": skipped[name]} for name in sorted(skipped)[:_REPORTED]]
    return {"count": len(skipped), "files": files}


@contextmanager
def explained(skipped: Mapping[str, str]) -> Iterator[None]:
    """Add to a ``DataError`` how many files are skipped: it may be about what they leave."""
    try:
        yield
    except DataError as error:
        if not skipped:
            raise
        raise DataError(f"{error} With data.on_bad: skip, {skipped_text(skipped)}.") from error


def shown_name(name: object) -> str:
    r"""Return a name for a message: as it is, or quoted with escapes if it holds what a terminal would act on.

    >>> print(shown_name("a.wav"), shown_name("two\nlines.wav"))
    a.wav 'two\nlines.wav'
    """
    text = str(name)
    return text if text.isprintable() else ascii(text)


def _state(file: Path) -> tuple[int, ...]:
    try:
        status = file.stat()
    except OSError:
        return ()
    return (status.st_size, status.st_mtime_ns, status.st_ino)
