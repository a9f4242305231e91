"""Lists of utterances as Kaldi writes them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from conservtl.errors import DataError
from conservtl.tasks.bad_files import shown_name
from conservtl.tasks.transcribe.lists import Line, base_of, lines_in, part_of

__all__ = ["kaldi_lines"]


def kaldi_lines(root: Path, files: Sequence[str]) -> Iterator[Line]:  # noqa: ARG001
    """Read ``wav.scp``, ``text`` and ``utt2spk``, with ``segments`` if there are; in the folder or its parts."""
    folders = [root] if (root / "wav.scp").is_file() else sorted(file.parent for file in root.glob("*/wav.scp"))
    for folder in folders:
        waves, texts, speakers = (_pairs(folder / name) for name in ("wav.scp", "text", "utt2spk"))
        segments = _pairs(folder / "segments") if (folder / "segments").is_file() else {}
        part = part_of(folder.name) if folder != root else None
        for name in dict.fromkeys([*texts, *(segments or waves)]):
            recording, offset, duration = name, 0.0, None
            if name in segments:
                recording, *times = segments[name].split()
                try:
                    offset, end = map(float, times)
                except ValueError as error:
                    raise DataError(
                        f"{shown_name(folder / 'segments')}: {name!r} must have a recording, a start and an end; "
                        f"received {segments[name]!r}. Correct it."
                    ) from error
                duration = None if end == -1 else end - offset  # -1: the end of the recording
            path = waves.get(recording)
            if path is not None and path.rstrip().endswith("|"):
                raise DataError(
                    f"{shown_name(folder / 'wav.scp')}: {recording!r} must be a file; a command is never run. Write "
                    "its output to a file, and name that."
                )
            yield Line(
                f"{folder.name}, {name}", path, base_of(path, root, folder), texts.get(name) or None,
                speakers.get(name), offset, duration, part, name,
            )  # fmt: skip


def _pairs(file: Path) -> dict[str, str]:
    if not file.is_file():
        raise DataError(
            f"data.root: the layout 'kaldi' needs wav.scp, text and utt2spk; {shown_name(file)} is missing."
        )
    pairs: dict[str, str] = {}
    for line in filter(str.strip, lines_in(file)):
        name, *rest = line.split(maxsplit=1)
        if name in pairs:
            raise DataError(f"{shown_name(file)} must name {name!r} once; it does twice. Remove one of the lines.")
        pairs[name] = rest[0].strip() if rest else ""
    return pairs
