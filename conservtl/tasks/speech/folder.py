"""Search for recordings by a pattern of their file names."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from unicodedata import normalize

from conservtl.errors import DataError, SpecError, agreeing, counted
from conservtl.extras import require
from conservtl.tasks.audio.listing import audio_files
from conservtl.tasks.bad_files import shown_name
from conservtl.tasks.speech.recordings import Recording

__all__ = [
    "FREE_SPOKEN_DIGITS",
    "SPEECH_COMMANDS",
    "check_pattern",
    "in_held_out_part",
    "search",
    "speech_commands_recordings",
]

FREE_SPOKEN_DIGITS = r"(?P<label>\d+)_(?P<speaker>[^_/]+)_(?P<take>\d+)\.(wav|flac)"
"""File names of free spoken digits, `7_theo_12.wav`, in any folder."""

SPEECH_COMMANDS = r"(?P<label>[^/]+)/(?P<speaker>[^/_]+)_nohash_(?P<take>\d+)\.(wav|flac)"
"""File names of Speech Commands, `seven/0a7c2a8d_nohash_0.wav`."""


def check_pattern(pattern: str) -> None:
    """Raise unless a pattern is a regular expression with the groups `label` and `speaker`."""
    try:
        groups = re.compile(pattern).groupindex
    except re.error as error:
        raise SpecError(
            f"data.pattern must be a regular expression; received {pattern!r}, which is not one ({error}). Correct "
            f"it; the default is {FREE_SPOKEN_DIGITS!r}."
        ) from error
    for group in ("label", "speaker"):
        if group not in groups:
            raise SpecError(
                f"data.pattern must have the named groups 'label' and 'speaker' ('take' is optional); {pattern!r} has "
                f"no '{group}'. Add (?P<{group}>...)."
            )
    if unknown := set(groups) - {"label", "speaker", "take"}:
        raise SpecError(
            f"data.pattern may have the named groups 'label', 'speaker' and 'take' only; received {sorted(unknown)}. "
            f"Write (?:...) for a group without a name."
        )


def search(
    root: Path,
    pattern: str,
    held_out_takes: Collection[int],
    words: Collection[str] | None = None,
    *,
    follow_links: bool = False,
) -> tuple[list[Recording], tuple[str, ...], dict[Path, str]]:
    """Return every recording below ``root`` whose path matches, and remarks on audio files that do not.

    The pattern, with the groups `label`, `speaker` and optionally `take`, must match the end of the path relative to
    ``root`` (in NFC, with `/` between folders), from the start of a file's or a folder's name; the case of the
    extension does not matter. Hidden files and folders are skipped. Without the group `take`, the recordings of a word
    and speaker are numbered by name. ``held_out_takes`` are those of the source's test part; ``words`` of None are all.

    Returns:
        Recordings in the order of words, speakers and takes, with labels and speakers in NFC; remarks; files and
        folders that are left out as bad -> why.

    Raises:
        SpecError: the pattern is invalid.
        DataError: the folder is missing, no file matches, a take is not a number, or a word is missing.
    """
    check_pattern(pattern)
    if not root.is_dir():
        raise DataError(f"data.root must be a folder of recordings; {root} is not one. Correct the path.")
    found, bad = audio_files(root, follow_links=follow_links)
    start = len(root.as_posix().rstrip("/")) + 1 if root.parts else 0
    paths = {file: normalize("NFC", file.as_posix()[start:]) for file in found}
    files = sorted(paths, key=lambda file: (paths[file], str(file)))
    expression = re.compile(rf"(?:.*/)?(?:{normalize('NFC', pattern)})")
    matches = [(file, match) for file in files if (match := _match(expression, paths[file]))]
    if not matches:
        also = f" ({counted(len(bad), 'bad file')} apart)" if bad else ""
        example = f"one of them is {paths[files[0]]!r}" if files else "there are no audio files"
        raise DataError(
            f"data.pattern: '{pattern}' matches the end of none of {counted(len(files), 'audio file')} under {root}; "
            f"{example}{also}. "
            f"Write a pattern of the whole name, extension included, with the groups 'label', 'speaker' and optionally "
            "'take'."
        )
    counts: Counter[tuple[str, str]] = Counter()
    recordings: list[Recording] = []
    for file, match in matches:
        label, speaker = match["label"], match["speaker"]
        take = _take(file, match, counts[label, speaker])
        counts[label, speaker] += 1
        recordings.append(Recording(str(file), label, speaker, take in held_out_takes, take))
    ordered = sorted(recordings, key=lambda one: (one.label, one.speaker, one.take, paths[Path(one.name)]))
    return _of_words(ordered, words), _unmatched(matches, files, paths), bad


def _match(expression: re.Pattern[str], path: str) -> re.Match[str] | None:
    """Match a path with its extension as it is, in lower case and in upper case."""
    stem, dot, extension = path.rpartition(".")
    spellings = dict.fromkeys((extension, extension.lower(), extension.upper()))
    return next((match for text in spellings if (match := expression.fullmatch(stem + dot + text))), None)


def _unmatched(
    matches: Sequence[tuple[Path, re.Match[str]]], files: Sequence[Path], paths: Mapping[Path, str]
) -> tuple[str, ...]:
    known = {file for file, _ in matches}
    rest = [paths[file] for file in files if file not in known]
    if not rest:
        return ()
    kinds = Counter(path.rpartition(".")[2].lower() for path in rest)
    each = ", ".join(f"{count} .{kind}" for kind, count in sorted(kinds.items()))
    text = f"{counted(len(rest), 'audio file', 'does', of=len(files))} not match data.pattern and "
    return (f"{text}{agreeing(len(rest), 'is')} left out ({each}), such as {shown_name(rest[0])}",)


def _take(file: Path, match: re.Match[str], default: int) -> int:
    text = match.groupdict().get("take")
    if text is None:
        return default
    if not text.isdecimal():
        raise DataError(
            f"data.pattern: the group 'take' must match a number; it matches {text!r} in {shown_name(file)}. "
            "Use \\d+ for it."
        )
    return int(text)


def _of_words(recordings: list[Recording], words: Collection[str] | None) -> list[Recording]:
    if words is None:
        return recordings
    known = {r.label for r in recordings}
    if missing := set(words) - known:
        raise DataError(
            f"data.words must be words of the recordings; received {sorted(missing)}. "
            f"Choose from: {sorted(known)[:40]}."
        )
    return [r for r in recordings if r.label in words]


def in_held_out_part(name: str, share: float) -> bool:
    """Return whether a recording belongs to a random part that is the same in every run, by its name's hash."""
    return int(hashlib.sha256(normalize("NFC", name).encode()).hexdigest()[:8], 16) < share * 2**32


def speech_commands_recordings(
    root: Path, version: str, held_out: float, words: Sequence[str] | None
) -> list[Recording]:
    """Return the recordings of Speech Commands below ``root``; nothing is downloaded or decoded."""
    datasets = require("torchaudio.datasets", "torchaudio")
    try:
        listing = datasets.SPEECHCOMMANDS(root, url=version, download=False)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"data.root must hold {version} in the folder that torchaudio uses, {root / 'SpeechCommands' / version}: "
            f"{error}. Unpack it there, or use kind 'folder' with the pattern {SPEECH_COMMANDS!r}."
        ) from error
    recordings = []
    for index in range(len(listing)):
        path, _, label, speaker, _ = listing.get_metadata(index)
        file, held = str(root / "SpeechCommands" / path), in_held_out_part(Path(path).as_posix(), held_out)
        recordings.append(Recording(file, normalize("NFC", label), speaker, held_out=held))
    return _of_words(sorted(recordings, key=lambda r: (r.label, r.speaker, r.name)), words)
