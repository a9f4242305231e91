"""Files of a run's checkpoints: written atomically, the last two kept.

A damaged one is recognised by the checksums in its file, and the one before is taken.
"""

from __future__ import annotations

import json
import time
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from conservtl.errors import SpecError
from conservtl.storage.files import atomic_path, write_text

__all__ = ["CHECKPOINTS", "Checkpoints"]

CHECKPOINTS = _LAST, _PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"
_OVERHEAD = 20  # least time between checkpoints, as a multiple of the time that the last one took to write


class Checkpoints:
    """A folder's ``checkpoint.pt``, the one before it, and ``history.jsonl``; without a folder nothing is written."""

    def __init__(self, folder: Path | None, main: bool = True) -> None:
        self.folder = folder
        self._writes = main and folder is not None
        self._due = 0.0

    @property
    def due(self) -> bool:
        """Whether the last checkpoint is so old that writing another would not slow the run down."""
        return self.folder is not None and time.perf_counter() >= self._due

    def save(self, content: Callable[[], Mapping[str, Any]], *, now: bool = False) -> None:
        """Write a checkpoint if this process writes and the last one is old enough, or in any case if ``now``."""
        if self.folder is None or not (now or (self._writes and self.due)):
            return
        begun = time.perf_counter()
        with atomic_path(self._path()) as temporary:
            torch.save(dict(content()), temporary)
            if self._path().is_file():
                self._path().replace(self._path(_PREVIOUS))
        self._due = time.perf_counter() + _OVERHEAD * (time.perf_counter() - begun)

    def exist(self) -> bool:
        """Return whether there is a checkpoint to resume from."""
        return self.folder is not None and any(self._path(name).is_file() for name in CHECKPOINTS)

    def load(self) -> dict[str, Any]:
        """Return the checkpoint to resume from: the last one, or with a warning the one before if that is damaged."""
        if self.folder is None:
            raise SpecError("resume: the checkpoint is read from out, which is None. Pass the folder of the run.")
        paths = [path for path in map(self._path, CHECKPOINTS) if path.is_file()]
        if not paths:
            raise SpecError(f"resume: there is no checkpoint in {self.folder}. Run without resume to begin.")
        errors = []
        for path in paths:
            try:
                loaded = _read(path)
            except SpecError as error:
                errors.append(str(error))
                continue
            if errors:
                warnings.warn(f"resume: {errors[0]} Resuming from {path.name}, the one before.", stacklevel=2)
            return loaded
        raise SpecError(f"resume: {' '.join(errors)} Run without resume to begin.")

    def end(self) -> None:
        """Delete the checkpoint before the last one, once a run has ended."""
        if self._writes:
            self._path(_PREVIOUS).unlink(missing_ok=True)

    def write_history(self, history: Sequence[Mapping[str, Any]]) -> None:
        """Write ``history.jsonl``, one line per epoch."""
        if self._writes and self.folder is not None:
            write_text("".join(json.dumps(line) + "\n" for line in history), self.folder / "history.jsonl")

    def _path(self, name: str = _LAST) -> Path:
        return (self.folder or Path()) / name


def _read(path: Path) -> dict[str, Any]:
    """Return the content of a checkpoint, whose checksums are compared."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load does not compare the checksums
        if damaged is None:
            loaded: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            return loaded
    except Exception as error:  # a damaged file raises what its bytes happen to lead to
        raise SpecError(f"{path} cannot be read: {error}") from error
    raise SpecError(f"{path} cannot be read: the checksum of its part {damaged!r} differs.")
