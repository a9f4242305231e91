"""Files of a repository on the Hugging Face Hub: found, announced and downloaded by its own library."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conservtl.errors import SourceError
from conservtl.extras import require
from conservtl.source.downloads import announce, one_line

__all__ = ["Found", "Repository"]


@dataclass(frozen=True)
class Found:
    """A file of a repository.

    Args:
        file: its name.
        commit: at which it was found.
        size: in bytes; None: unknown, or on this machine already.
        path: on this machine; None: it is to be downloaded.
    """

    file: str
    commit: str
    size: int | None = None
    path: Path | None = None


@dataclass(frozen=True)
class Repository:
    """A repository at a revision.

    Args:
        name: ``ORG/NAME``.
        revision: branch, tag or commit.
        shown: name of the source in messages.
    """

    name: str
    revision: str
    shown: str

    def first(self, files: Sequence[str], otherwise: str) -> Found:
        """Return the first of these files that the repository has.

        A branch or tag is looked up on the server, or on this machine if the server cannot be reached.

        ``otherwise`` is a sentence for a repository that has none of them.
        """
        errors = require("huggingface_hub.errors", "hub")
        try:
            kept = [found for file in files if (found := self._kept(file)) is not None]
        except errors.HFValidationError as error:
            raise SourceError(f"source {self.shown}: {error}") from error
        if kept and kept[0].commit == self.revision:
            return kept[0]
        for file in files:
            try:
                return self._on_server(file)
            except errors.EntryNotFoundError:
                continue
            except Exception as error:  # of the network's library, which the version decides
                if kept:
                    return kept[0]
                raise self._failed(error, file) from error
        raise SourceError(
            f"source {self.shown}: the repository must hold {' or '.join(files)} at {self.revision}; it does not. "
            f"{otherwise}"
        )

    def download(self, files: Sequence[str]) -> list[Path]:
        """Return the paths of files on this machine, downloaded if need be."""
        missing = [file for file in files if self._kept(file) is None]
        current = ""
        try:
            if missing:
                found = [self._on_server(current := file) for file in missing]
                sizes = [one.size for one in found if one.size is not None]
                whole = sum(sizes) if len(sizes) == len(found) else None
                announce(self.shown, whole, self._folder(found[0].commit))
            fetch = require("huggingface_hub", "hub").hf_hub_download
            return [Path(fetch(self.name, current := file, revision=self.revision)) for file in files]
        except Exception as error:
            raise self._failed(error, current) from error

    def present(self, files: Sequence[str]) -> dict[str, Path]:
        """Return those of these files that the repository has, downloaded if need be: name -> path."""
        hub, errors = require("huggingface_hub", "hub"), require("huggingface_hub.errors", "hub")
        found = {file: kept.path for file in files if (kept := self._kept(file)) is not None and kept.path is not None}
        for file in files:
            if file in found:
                continue
            try:
                found[file] = Path(hub.hf_hub_download(self.name, file, revision=self.revision))
            except errors.EntryNotFoundError:
                continue
            except Exception as error:
                if found:
                    break
                raise self._failed(error, file) from error
        return found

    def _kept(self, file: str) -> Found | None:
        """Return a file that was downloaded before; None if it was not."""
        path = require("huggingface_hub", "hub").try_to_load_from_cache(self.name, file, revision=self.revision)
        if not isinstance(path, str):
            return None
        folder = Path(path).parents[len(Path(file).parts) - 1]
        return Found(file, folder.name, path=Path(path))

    def _on_server(self, file: str) -> Found:
        hub = require("huggingface_hub", "hub")
        told: Any = hub.get_hf_file_metadata(hub.hf_hub_url(self.name, file, revision=self.revision))
        return Found(file, told.commit_hash, told.size)

    def _folder(self, commit: str) -> Path:
        """Return where the library keeps the files of a commit."""
        cache = require("huggingface_hub.constants", "hub").HF_HUB_CACHE
        return Path(cache) / f"models--{self.name.replace('/', '--')}" / "snapshots" / commit

    def _failed(self, error: Exception, file: str) -> SourceError:
        errors = require("huggingface_hub.errors", "hub")
        where = f"source {self.shown}"
        if isinstance(error, errors.GatedRepoError):
            return SourceError(f"{where}: {self.name} needs permission. Ask for it on its page, then hf auth login.")
        if isinstance(error, errors.RepositoryNotFoundError):
            return SourceError(
                f"{where}: there is no repository {self.name!r} that you may read. Correct it, or hf auth login."
            )
        if isinstance(error, errors.RevisionNotFoundError):
            return SourceError(f"{where}: {self.name} has no revision {self.revision!r}. Correct it.")
        pinned = len(self.revision) == 40  # digits of a commit
        place = str(self._folder(self.revision) / file) if pinned else "a folder, and give the folder as the source"
        return SourceError(
            f"{where}: {file} of {self.name} cannot be downloaded ({one_line(error)}). Download it on another machine "
            f"and put it {'at' if pinned else 'in'} {place}"
        )
