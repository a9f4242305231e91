"""Lists of utterances in files: NeMo's JSON lines, CSV and TSV, Kaldi, LibriSpeech, Common Voice, audiofolder."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from conservtl.errors import DataError, counted
from conservtl.tasks.bad_files import shown_name
from conservtl.tasks.transcribe.kaldi import kaldi_lines
from conservtl.tasks.transcribe.lists import Line, base_of, is_missing, lines_in, part_of, text_of

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
        except json.JSONDecodeError:
            content = None
        if not isinstance(content, dict):
            raise DataError(
                f"{shown_name(file)}, line {number} must be a JSON object; received {text[:40]!r}. Correct it: each "
                "utterance is an object on a line of its own."
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
    columns = rows.fieldnames = [name.strip().lower() for name in rows.fieldnames or ()]
    if twice := sorted({name for name in columns if name and columns.count(name) > 1}):
        raise DataError(f"{shown_name(file)} must have each column once; it has {', '.join(twice)} twice. Rename one.")
    for names, what in ((_PATHS, "path"), (_TEXTS, "text")):
        if not set(names) & set(columns):
            raise DataError(
                f"{shown_name(file)} must have a column for the {what} ({', '.join(names)}); it has "
                f"{', '.join(list(columns)[:_SHOWN]) or 'none'}. Rename one."
            )
    try:
        for row in rows:
            if not any(row.values()):
                continue
            more = len(row.pop(None, ()))
            line = _line(file, rows.line_num, row, root)
            cells = f"{counted(len(columns) + more, 'cell')} for {counted(len(columns), 'column')}"
            fix = "write a space for a tab in a text" if tabs else "put a text with commas in quotes"
            yield replace(line, fault=f"has {cells}; {fix}") if more else line
    except csv.Error as error:
        raise DataError(
            f"{shown_name(file)}, line {rows.line_num} must be a row of a table: {error}. Correct its quotes."
        ) from error


def _line(file: Path, number: int, content: Mapping[str, Any], root: Path) -> Line:
    def of(names: Sequence[str]) -> Any:
        return next((content[name] for name in names if not is_missing(content.get(name))), None)

    content = {name.lower(): value for name, value in content.items()}
    where = os.path.relpath(file, root)
    names = (str(content.get("split") or content.get("part") or ""), *reversed(Path(where).parts))
    path, text, speaker = of(_PATHS), of(_TEXTS), of(_SPEAKERS)
    values = (("recording", path), ("text", text), ("speaker", speaker))
    wrong = [
        f"has a {name} that is none, {value!r:.40}"
        for name, value in values
        if isinstance(value, bool) or not isinstance(value, str | int | float | None)
    ]
    path = None if path is None else str(path)
    return Line(
        where=f"{where}, line {number}",
        path=path,
        base=base_of(path, root, file.parent),
        text=None if text is None else str(text),
        speaker=None if speaker is None else str(speaker),
        offset=content.get("offset") or 0.0,
        duration=content.get("duration") if content.get("duration") not in (None, "") else None,
        part=part_of(*names),
        fields=content,
        fault=wrong[0] if wrong else None,
    )


def _librispeech(root: Path, files: Sequence[str]) -> Iterator[Line]:  # noqa: ARG001
    """Read SUBSET/SPEAKER/CHAPTER/SPEAKER-CHAPTER.trans.txt; a subset is train-*, dev-* or test-*."""
    for file in sorted(root.rglob("*.trans.txt")):
        part = part_of(*reversed(file.relative_to(root).parent.parts), root.name)
        for line in lines_in(file):
            name, _, text = line.strip().partition(" ")
            if name:
                path = str((file.parent / f"{name}.flac").relative_to(root))
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
            yield replace(line, path=path, base=root, part=part_of(name))


def _audiofolder(root: Path, files: Sequence[str]) -> Iterator[Line]:  # noqa: ARG001
    """Read metadata.csv (or .jsonl) in any folder; parts are folders of the recordings: train/, validation/, test/."""
    for file in sorted({*root.rglob("metadata.csv"), *root.rglob("metadata.jsonl")}):
        for line in (_table if file.suffix == ".csv" else _json_lines)(file, root):
            folders = (file.parent.relative_to(root) / (line.path or "")).parent.parts
            yield replace(line, base=file.parent, part=line.part or part_of(*reversed(folders)))


LAYOUTS: dict[str, Callable[[Path, Sequence[str]], Iterator[Line]]] = {
    "manifest": _manifests,
    "kaldi": kaldi_lines,
    "librispeech": _librispeech,
    "common_voice": _common_voice,
    "audiofolder": _audiofolder,
}
"""Readers of lists by the kind of data."""
