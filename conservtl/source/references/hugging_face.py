"""Safetensors of a repository on the Hugging Face Hub: ``hf:ORG/NAME@REVISION``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from conservtl.errors import SourceError
from conservtl.source.folder import INDEX, SINGLE, shards
from conservtl.source.references._hub import Repository
from conservtl.source.references.reference import Reference

__all__ = ["HuggingFace"]

_TEXT = re.compile(r"hf:(?P<name>[\w.-]+(/[\w.-]+)?)(@(?P<revision>(?!.*\.\.)[\w.+/-]+))?")
_SAFE = "Only safetensors are read from the Hub: convert the weights, or download them and give their path."
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HuggingFace(Reference):
    """Weights in a repository, as ``save_pretrained`` writes them.

    Args:
        name: ``ORG/NAME``.
        revision: branch, tag or commit.
    """

    name: str
    revision: str

    schemes = ("hf",)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Split name and revision."""
        parts = _TEXT.fullmatch(text)
        if parts is None:
            raise SourceError(f"source {text!r} must have the form hf:ORG/NAME@REVISION. Correct it.")
        if parts["revision"] is None:
            raise SourceError(
                f"source {text!r} must name a revision, without which it means other weights tomorrow: a commit, a tag "
                f"or a branch. Write {text}@main, or the commit that the repository's page shows."
            )
        return cls(parts["name"], parts["revision"])

    def pinned(self) -> Self:
        """Return the reference with the commit that its branch or tag is at now."""
        if _COMMIT.fullmatch(self.revision):
            return self
        return type(self)(self.name, self.repository.first((SINGLE, INDEX), _SAFE).commit)

    def read(self) -> Path:
        """Return the file, or the folder that has the index and its files."""
        repository = self.pinned().repository
        found = repository.first((SINGLE, INDEX), _SAFE)
        (path,) = repository.download([found.file])
        if found.file == SINGLE:
            return path
        repository.download(shards(path))
        return path.parent

    @property
    def repository(self) -> Repository:
        """The repository at this revision."""
        return Repository(self.name, self.revision, str(self))

    def __str__(self) -> str:
        return f"hf:{self.name}@{self.revision}"
