"""Search for recordings by a pattern of their file names."""

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
"""File names of free spoken digits, `7_theo_12.wav`, in any folder."""

SPEECH_COMMANDS = r"(?P<label>[^/]+)/(?P<speaker>[^/_]+)_nohash_(?P<take>\d+)\.(wav|flac)"
"""File names of Speech Commands, `seven/0a7c2a8d_nohash_0.wav`."""

_AUDIO = {".wav", ".flac", ".ogg", ".mp3", ".aiff", ".aif", ".au"}


def check_pattern(pattern: str) -> None:
    """Raise unless a pattern is a regular expression with the groups `label` and `speaker`.

    Raises:
        SpecError: the pattern is invalid.
    """
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


def find_recordings(
    root: Path,
    pattern: str,
    held_out_takes: Collection[int],
    words: Collection[str] | None = None,
) -> list[Recording]:
    """Return every recording below ``root`` whose path matches, in the order of words, speakers and takes.

    The pattern must match the end of the path relative to ``root`` (with `/` between folders), from the start of a
    file's or a folder's name. Without the group `take`, the recordings of a word and speaker are numbered by name.

    Args:
        root: the folder to search.
        pattern: regular expression with the groups `label`, `speaker` and optionally `take`.
        held_out_takes: takes of the source's test part.
        words: labels to use; None for all.

    Raises:
        SpecError: the pattern is invalid.
        DataError: the folder is missing, no file matches, a take is not a number, or a word is missing.
    """
    check_pattern(pattern)
    if not root.is_dir():
        raise DataError(f"data.root must be a folder of recordings; {root} is not one. Correct the path.")
    files = sorted(f for f in root.rglob("*") if f.suffix.lower() in _AUDIO and f.is_file())
    expression = re.compile(rf"(?:.*/)?(?:{pattern})")
    matches = [(f, m) for f in files if (m := expression.fullmatch(f.relative_to(root).as_posix()))]
    if not matches:
        example = f"one of them is {files[0].relative_to(root).as_posix()!r}" if files else "there are no audio files"
        raise DataError(
            f"data.pattern: {pattern!r} matches none of the {len(files)} audio files under {root}; "
            f"{example}. "
            f"Write a pattern with the groups 'label', 'speaker' and optionally 'take'."
        )
    counts: Counter[tuple[str, str]] = Counter()
    recordings: list[tuple[int, Recording]] = []
    for file, match in matches:
        label, speaker = match["label"], match["speaker"]
        take = _take(file, match, counts[label, speaker])
        counts[label, speaker] += 1
        recordings.append((take, Recording(str(file), label, speaker, held_out=take in held_out_takes)))
    ordered = sorted(recordings, key=lambda item: (item[1].label, item[1].speaker, item[0], item[1].name))
    return _of_words([recording for _, recording in ordered], words)


def _take(file: Path, match: re.Match[str], default: int) -> int:
    text = match.groupdict().get("take")
    if text is None:
        return default
    if not text.isdecimal():
        raise DataError(
            f"data.pattern: the group 'take' must match a number; it matches {text!r} in {file}. Use \\d+ for it."
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
    return int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) < share * 2**32


def speech_commands_recordings(
    root: Path, version: str, held_out: float, words: Sequence[str] | None
) -> list[Recording]:
    """Return the recordings of Speech Commands below ``root``; nothing is downloaded or decoded.

    Raises:
        DataError: the set or a word is missing.
    """
    datasets = require("torchaudio.datasets", "speech")
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
        name = str(Path(path).as_posix())
        file = str(root / "SpeechCommands" / path)
        recordings.append(Recording(file, label, speaker, held_out=in_held_out_part(name, held_out)))
    return _of_words(sorted(recordings, key=lambda r: (r.label, r.speaker, r.name)), words)
