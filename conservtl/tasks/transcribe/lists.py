"""A line of a list of utterances, as it is written, and the text of a list."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conservtl.errors import DataError
from conservtl.tasks.bad_files import shown_name
from conservtl.tasks.transcribe.utterances import Part

__all__ = ["Line", "base_of", "is_missing", "lines_in", "part_of", "text_of"]

_PARTS: dict[Part, tuple[str, ...]] = {
    "train": ("train", "training", "validated"),
    "dev": ("dev", "valid", "validation", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}


@dataclass(frozen=True)
class Line:
    """One line of a list, as it is written.

    Args:
        where: file and line, for messages.
        path: of the recording, relative to ``base`` unless absolute.
        base: folder of the list.
        text: of the utterance; None: missing.
        speaker: None: missing.
        offset: in seconds, as written.
        duration: in seconds, as written; None: to the end of the recording.
        part: the official part.
        name: of the utterance, if the list names it.
        fields: all columns by their names in lower case, where the list has any.
        fault: why the line cannot be used, if its form says so.
    """

    where: str
    path: str | None
    base: Path
    text: str | None
    speaker: str | None
    offset: Any = 0.0
    duration: Any = None
    part: Part | None = None
    name: str | None = None
    fields: Mapping[str, Any] | None = None
    fault: str | None = None


def part_of(*names: str) -> Part | None:
    """Return the part that is a word of a file's, a folder's or a column's name: of the first name that has one.

    >>> part_of("all", "test-clean"), part_of("manifest_dev"), part_of("testimony")
    ('test', 'dev', None)
    """
    words = (word for one in names for word in re.split("[^a-z]+", one.lower()))
    return next((part for word in words for part, known in _PARTS.items() if word in known), None)


def base_of(path: str | None, root: Path, folder: Path) -> Path:
    """Return what a path is relative to: the root if there is such a file, else the folder of its list."""
    try:
        return root if path is None or folder == root or (root / path).exists() else folder
    except OSError:  # no name of a file: too long
        return folder


def is_missing(value: Any) -> bool:
    """Return whether a cell is empty; NaN stands for an empty one."""
    return value is None or value == "" or value != value  # noqa: PLR0124


def lines_in(file: Path) -> list[str]:
    """Return the lines of a list."""
    return text_of(file).split("\n")  # a text may hold other separators, such as U+2028


def text_of(file: Path) -> str:
    """Return the text of a list, without a byte order mark."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{shown_name(file)} must be text in UTF-8; {error.reason} at byte {error.start}. Convert it."
        ) from error
    except OSError as error:
        raise DataError(f"{shown_name(file)} cannot be read: {error.strerror}.") from error
