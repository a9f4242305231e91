"""A line of a list of utterances, as it is written, and the text of a list."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conservtl.errors import DataError
from conservtl.tasks.bad_files import shown_name
from conservtl.tasks.transcribe.utterances import Part

__all__ = ["PARTS", "Line", "lines_in", "text_of"]

PARTS: dict[str, Part] = {
    "train": "train",
    "training": "train",
    "validated": "train",
    "dev": "dev",
    "valid": "dev",
    "validation": "dev",
    "val": "dev",
    "test": "test",
    "testing": "test",
}
"""Names of parts in files, folders and columns."""


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
        fields: all columns, where the list has any.
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
