"""Recordings below a folder."""

from __future__ import annotations

from pathlib import Path

from conservtl.errors import DataError
from conservtl.tasks.audio.reading import read_audio
from conservtl.tasks.bad_files import check_files, shown_name
from conservtl.tasks.file_listing import FolderWalk

__all__ = ["audio_files", "usable_recordings"]

_AUDIO = {
    *(".aif", ".aifc", ".aiff", ".au", ".caf", ".flac", ".m4a", ".mp3", ".oga", ".ogg", ".opus", ".rf64", ".snd"),
    *(".sph", ".voc", ".w64", ".wav", ".wma"),
}


def audio_files(root: Path, *, follow_links: bool) -> tuple[list[Path], dict[Path, str]]:
    """Return the visible audio files in a folder and its subfolders, and what is left out as bad -> why."""
    walk = FolderWalk(
        root,
        is_wanted=lambda name: not name.startswith(".") and Path(name).suffix.lower() in _AUDIO,
        is_hidden=lambda name: name.startswith("."),
        follow_links=follow_links,
    )
    files: list[Path] = []
    walk.add_files(root, files)
    walk.finish()
    return files, walk.bad


def usable_recordings(root: Path, field: str, *, follow_links: bool) -> list[Path]:
    """Return the audio files in a folder and its subfolders, in order; each is read, and must be usable."""
    if not root.is_dir():
        raise DataError(f"{field} must be a folder of recordings; {shown_name(root)} is not one. Correct the path.")
    files, bad = audio_files(root, follow_links=follow_links)
    if not files and not bad:
        raise DataError(f"{field} must hold recordings; there is none below {shown_name(root)}. Correct the path.")
    bad |= check_files(files, read_audio, "audio")
    if bad:
        first = min(bad)
        reason = bad[first].replace("data.follow_links", f"{field.rpartition('.')[0]}.follow_links")
        raise DataError(f"{field}: {shown_name(first)} {reason}. Replace or remove it.")
    return sorted(files)
