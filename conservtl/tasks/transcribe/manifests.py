"""Lists of utterances in files: NeMo's JSON lines, CSV and TSV, Kaldi, LibriSpeech, Common Voice, audiofolder."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from conservtl.errors import DataError, counted
from conservtl.tasks.bad_files import shown_name
from conservtl.tasks.transcribe.kaldi import kaldi_lines
from conservtl.tasks.transcribe.lists import PARTS, Line, lines_in, text_of

__all__ = ["LAYOUTS", "Line", "lines_of"]

_PATHS = ("path", "audio_filepath", "file_name", "audio", "file", "wav")
_TEXTS = ("text", "sentence", "transcript", "transcription", "normalized_text")
_SPEAKERS = ("speaker", "speaker_id", "client_id", "spk_id")
_SHOWN = 8  # names in a message


def lines_of(layout: str, root: Path, files: Sequence[str]) -> list[Line]:
    """Return the lines of all lists below a folder, in order; ``files`` are those of ``manifest``, all if empty.

    Raises:
        DataError: the folder, a list or one of its columns is missing.
    """
    if not root.is_dir():
        raise DataError(f"data.root must be a folder; {shown_name(root)} is not one. Correct the path.")
    found = list(LAYOUTS[layout](root, files))
    if not found and layout == "manifest":
        names = ", ".join(map(shown_name, files)) or f"those in {shown_name(root)}"
        raise DataError(
            f"data.files must be lists with a line for each utterance; received {names} without any. Fill them."
        )
    if not found:
        raise DataError(f"data.root {shown_name(root)} holds no utterance in the layout {layout!r}. Correct data.kind.")
    return found


def _manifests(root: Path, files: Sequence[str]) -> Iterator[Line]:
    if not files:
        wanted = (".json", ".jsonl", ".csv", ".tsv")
        files = sorted(file.name for file in root.iterdir() if file.suffix.lower() in wanted)
    if not files:
        raise DataError(
            f"data.files must name a manifest; {shown_name(root)} has no .json, .jsonl, .csv or .tsv. Name it."
        )
    for name in files:
        file = root / name
        if not file.is_file():
            raise DataError(f"data.files: there is no file {shown_name(file)}. Correct the name.")
        yield from (_json_lines if file.suffix.lower() in (".json", ".jsonl") else _table)(file, root)


def _json_lines(file: Path, root: Path) -> Iterator[Line]:
    for number, text in enumerate(lines_in(file), 1):
        if not text.strip():
            continue
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"{shown_name(file)}, line {number} must be a JSON object: {error}. Correct it.") from error
        if not isinstance(content, dict):
            raise DataError(
                f"{shown_name(file)}, line {number} must be a JSON object; received {text[:40]!r}. Correct it."
            )
        yield _line(file, number, content, root)


def _table(file: Path, root: Path) -> Iterator[Line]:
    tabs = file.suffix.lower() == ".tsv"
    rows = csv.DictReader(
        io.StringIO(text_of(file), newline=""),
        delimiter="\t" if tabs else ",",
        quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL,
        skipinitialspace=not tabs,
    )
    columns = rows.fieldnames = [name.strip() for name in rows.fieldnames or ()]
    for names, what in ((_PATHS, "path"), (_TEXTS, "text")):
        if not set(names) & set(columns):
            raise DataError(
                f"{shown_name(file)} must have a column for the {what} ({', '.join(names)}); it has "
                f"{', '.join(list(columns)[:_SHOWN]) or 'none'}. Rename one."
            )
    try:
        for row in rows:
            more = len(row.pop(None, ()))
            line = _line(file, rows.line_num, row, root)
            cells = f"{counted(len(columns) + more, 'cell')} for {counted(len(columns), 'column')}"
            fault = f"has {cells}; put a text with commas in quotes"
            yield replace(line, fault=fault) if more else line
    except csv.Error as error:
        raise DataError(
            f"{shown_name(file)}, line {rows.line_num} must be a row of a table: {error}. Correct its quotes."
        ) from error


def _line(file: Path, number: int, content: Mapping[str, Any], root: Path) -> Line:
    def of(names: Sequence[str]) -> Any:
        return next((content[name] for name in names if content.get(name) not in (None, "")), None)

    said = str(content.get("split") or content.get("part") or "").lower()
    named = next((PARTS[piece] for piece in file.stem.lower().replace("-", "_").split("_") if piece in PARTS), None)
    path, text, speaker = of(_PATHS), of(_TEXTS), of(_SPEAKERS)
    base = root if file.parent == root or (root / str(path)).exists() else file.parent
    told = isinstance(text, str | int | float | None) and not isinstance(text, bool)
    return Line(
        where=f"{file.name}, line {number}",
        path=None if path is None else str(path),
        base=base,
        text=None if text is None else str(text),
        speaker=None if speaker is None else str(speaker),
        offset=content.get("offset") or 0.0,
        duration=content.get("duration") if content.get("duration") not in (None, "") else None,
        part=PARTS.get(said) or named,
        fields=content,
        fault=None if told else f"has a text that is none, {text!r:.40}",
    )


def _librispeech(root: Path, files: Sequence[str]) -> Iterator[Line]:  # noqa: ARG001
    """Read SUBSET/SPEAKER/CHAPTER/SPEAKER-CHAPTER.trans.txt; a subset is train-*, dev-* or test-*."""
    for file in sorted(root.rglob("*.trans.txt")):
        subset = next((each for each in reversed(file.relative_to(root).parts) if each.partition("-")[0] in PARTS), "")
        if not subset and root.name.partition("-")[0] in PARTS:
            subset = root.name
        for line in lines_in(file):
            name, _, text = line.strip().partition(" ")
            if name:
                path = str((file.parent / f"{name}.flac").relative_to(root))
                part = PARTS.get(subset.partition("-")[0])
                yield Line(
                    f"{file.name}, {name}", path, root, text or None, name.partition("-")[0], part=part, name=name
                )


def _common_voice(root: Path, files: Sequence[str]) -> Iterator[Line]:  # noqa: ARG001
    """Read train.tsv, dev.tsv and test.tsv, or validated.tsv alone, and recordings in clips/."""
    lists = [name for name in ("train", "dev", "test") if (root / f"{name}.tsv").is_file()] or ["validated"]
    for name in lists:
        file = root / f"{name}.tsv"
        if not file.is_file():
            raise DataError(
                f"data.root must hold train.tsv, dev.tsv and test.tsv of Common Voice, or validated.tsv; "
                f"{shown_name(root)} has none. Correct the path: it is the folder of one language."
            )
        for line in _table(file, root):
            path = None if line.path is None else f"clips/{line.path}"
            part = PARTS[name] if name != "validated" else None
            yield replace(line, path=path, base=root, part=part)


def _audiofolder(root: Path, files: Sequence[str]) -> Iterator[Line]:  # noqa: ARG001
    """Read metadata.csv (or .jsonl) in the folder or in its parts train/, validation/ and test/."""
    for file in sorted({*root.rglob("metadata.csv"), *root.rglob("metadata.jsonl")}):
        part = next((PARTS[each.lower()] for each in file.relative_to(root).parts if each.lower() in PARTS), None)
        for line in (_table if file.suffix == ".csv" else _json_lines)(file, file.parent):
            yield replace(line, base=file.parent, part=part)


LAYOUTS: dict[str, Callable[[Path, Sequence[str]], Iterator[Line]]] = {
    "manifest": _manifests,
    "kaldi": kaldi_lines,
    "librispeech": _librispeech,
    "common_voice": _common_voice,
    "audiofolder": _audiofolder,
}
"""Readers of lists by the kind of data."""
