"""The cache of trained source models: private to its user, bounded in size, safe for many processes."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path

from torch import Tensor

from conservtl.engine.processes import is_main_process
from conservtl.errors import SourceError
from conservtl.storage.files import remove_temporary
from conservtl.storage.locks import wait_for_lock
from conservtl.storage.tensor_files import load_tensors, save_tensors

__all__ = ["CACHE_BYTES", "CacheEntry", "cache_entry"]

CACHE_BYTES = 4 * 2**30
"""Size that the cache is cut to after each new model; the models not used for longest go first."""

_DAY = 24 * 3600.0


@contextmanager
def cache_entry(folder: Path | None, name: str) -> Iterator[CacheEntry]:
    """Hold one model's place: a second process that needs the same model waits, and then finds it.

    Processes that train one model together hold it together: the first has the lock and stores the model.

    Args:
        folder: of source models; None: ``~/.cache/conservtl``, which only its user may read.
        name: a hash of everything that the model depends on.

    Raises:
        WriteError: the folder cannot be created or written to.
    """
    folder = folder or Path.home() / ".cache" / "conservtl"
    with wait_for_lock(folder / f".{name}.lock") if is_main_process() else nullcontext():
        yield CacheEntry(folder, name)


class CacheEntry:
    """A model's place in the cache.

    Args:
        folder: the cache.
        name: of the model.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._path = folder, folder / f"{name}.safetensors"
        self.unfinished = folder / f"{name}.unfinished"
        """Folder for the checkpoints of a model in training; a later process continues from them."""

    def load(self) -> dict[str, Tensor] | None:
        """Return the model's tensors; None if it is not there or, with a warning, if its file is damaged."""
        if not self._path.is_file():
            return None
        try:
            tensors = load_tensors(self._path)
        except SourceError as error:
            warnings.warn(f"{error} The source model is trained again.", stacklevel=2)
            return None
        self._path.touch()  # used now
        return tensors

    def store(self, tensors: Mapping[str, Tensor]) -> None:
        """Store a trained model, delete its checkpoints, and cut the cache to its size."""
        if not is_main_process():
            return
        save_tensors(tensors, self._path)
        shutil.rmtree(self.unfinished, ignore_errors=True)
        remove_temporary(self._folder, older=_DAY)
        files = sorted(self._folder.glob("*.safetensors"), key=lambda file: file.stat().st_mtime, reverse=True)
        total = 0
        for file in files:
            total += file.stat().st_size
            if total > CACHE_BYTES and file != self._path:
                file.unlink(missing_ok=True)
