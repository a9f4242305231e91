"""Recordings found by the pattern of their file names."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

from conservtl.errors import DataError, SpecError
from conservtl.extras import require
from conservtl.tasks.speech.recordings import Recording

__all__ = [
    "FREE_SPOKEN_DIGITS",
    "SPEECH_COMMANDS",
    "check_pattern",
    "find_recordings",
    "in_held_out_part",
    "speech_commands_recordings",
]

FREE_SPOKEN_DIGITS = r"(?P<label>\d+)_(?P<speaker>[^_/]+)_(?P<take>\d+)\.(wav|flac)"
"""`7_theo_12.wav`, as in free spoken digits; in any folder."""

SPEECH_COMMANDS = r"(?P<label>[^/]+)/(?P<speaker>[^/_]+)_nohash_(?P<take>\d+)\.(wav|flac)"
"""`seven/0a7c2a8d_nohash_0.wav`, as in Speech Commands."""

_AUDIO = {".wav", ".flac", ".ogg", ".mp3", ".aiff", ".aif", ".au"}


def check_pattern(pattern: str) -> None:
    """Check that a pattern is a regular expression with the groups `label` and `speaker`.

    Raises:
        SpecError: it is none.
    """
    try:
        groups = re.compile(pattern).groupindex
    except re.error as error:
        raise SpecError(
            f"data.pattern is a regular expression; {pattern!r} is not one ({error}). Correct it; the default is "
            f"{FREE_SPOKEN_DIGITS!r}."
        ) from error
    for group in ("label", "speaker"):
        if group not in groups:
            raise SpecError(
                f"data.pattern needs the named groups 'label' and 'speaker' ('take' is optional); {pattern!r} has "
                f"no '{group}'. Add (?P<{group}>...)."
            )
    if unknown := set(groups) - {"label", "speaker", "take"}:
        raise SpecError(
            f"data.pattern knows the groups 'label', 'speaker' and 'take'; got {sorted(unknown)} as well. "
            f"Write (?:...) for a group without a name."
        )


def find_recordings(
    root: Path,
    pattern: str,
    held_out_takes: Collection[int],
    words: Collection[str] | None = None,
) -> list[Recording]:
    """Every recording under ``root`` whose path matches, in the order of names and takes.

    The pattern must match the end of the path relative to ``root`` (with `/` between folders), from the
    start of a name. A pattern without `take` numbers the recordings of a word and speaker by name.

    Args:
        root: the folder to search.
        pattern: regular expression with the groups `label`, `speaker` and optionally `take`.
        held_out_takes: takes that are kept away from source training.
        words: labels to keep; all where None.

    Raises:
        SpecError: the pattern is none, or lacks a group.
        DataError: the folder is missing, nothing matches, a take is no number, or a word is not found.
    """
    check_pattern(pattern)
    if not root.is_dir():
        raise DataError(f"data.root must be a folder of recordings; {root} is not one. Set data.root to yours.")
    files = sorted(f for f in root.rglob("*") if f.suffix.lower() in _AUDIO and f.is_file())
    expression = re.compile(rf"(?:.*/)?(?:{pattern})")
    matches = [(f, m) for f in files if (m := expression.fullmatch(f.relative_to(root).as_posix()))]
    if not matches:
        example = f"one of them is {files[0].relative_to(root).as_posix()!r}" if files else "there is no audio"
        raise DataError(
            f"data.pattern: {pattern!r} matches none of the {len(files)} audio files under {root}; "
            f"{example}. "
            f"Write a pattern for it with the groups 'label', 'speaker' and, if there is one, 'take'."
        )
    seen: Counter[tuple[str, str]] = Counter()
    found: list[tuple[int, Recording]] = []
    for file, match in matches:
        label, speaker = match["label"], match["speaker"]
        take = _take(file, match, seen[label, speaker])
        seen[label, speaker] += 1
        found.append((take, Recording(str(file), label, speaker, held_out=take in held_out_takes)))
    ordered = sorted(found, key=lambda item: (item[1].label, item[1].speaker, item[0], item[1].name))
    return _spoken([recording for _, recording in ordered], words)


def _take(file: Path, match: re.Match[str], default: int) -> int:
    written = match.groupdict().get("take")
    if written is None:
        return default
    if not written.isdecimal():
        raise DataError(
            f"data.pattern: 'take' is a number; it matches {written!r} in {file}. Let it match digits only."
        )
    return int(written)


def _spoken(found: list[Recording], words: Collection[str] | None) -> list[Recording]:
    if words is None:
        return found
    known = {r.label for r in found}
    if missing := set(words) - known:
        raise DataError(
            f"data.words: no recording is of {sorted(missing)}. Name some of those found: {sorted(known)[:40]}."
        )
    return [r for r in found if r.label in words]


def in_held_out_part(name: str, part: float) -> bool:
    """Whether a recording belongs to a fixed random part: the same one in every run, by its name's hash."""
    return int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) < part * 2**32


def speech_commands_recordings(
    root: Path, version: str, held_out: float, words: Sequence[str] | None
) -> list[Recording]:
    """Speech Commands as torchaudio finds it under ``root``; nothing is downloaded or decoded.

    Raises:
        DataError: it is not there, or a word is not in it.
    """
    datasets = require("torchaudio.datasets", "speech")
    try:
        listing = datasets.SPEECHCOMMANDS(root, url=version, download=False)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"data.root: {root} holds no {version} as torchaudio lays it out "
            f"({root / 'SpeechCommands' / version}): {error}. Unpack it there, or use kind 'folder' with the "
            f"pattern {SPEECH_COMMANDS!r}."
        ) from error
    found = []
    for index in range(len(listing)):
        path, _, label, speaker, _ = listing.get_metadata(index)
        name = str(Path(path).as_posix())
        file = str(root / "SpeechCommands" / path)
        found.append(Recording(file, label, speaker, held_out=in_held_out_part(name, held_out)))
    return _spoken(sorted(found, key=lambda r: (r.label, r.speaker, r.name)), words)
