"""A file by its URL, with its hash."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Self
from urllib.parse import unquote, urldefrag, urlsplit

from conservtl.errors import SourceError
from conservtl.source.downloads import checkpoints, digest_in, download
from conservtl.source.references.reference import Reference

__all__ = ["Url"]

_FRAGMENT = re.compile(r"sha256[=:]([0-9a-fA-F]{8,64})")


@dataclass(frozen=True)
class Url(Reference):
    """A file by its URL.

    Args:
        text: the URL, with ``#sha256=...`` or a hash in the file's name.
        file: name of the file on this machine.
        digest: beginning of its SHA-256.
    """

    text: str
    file: str
    digest: str

    schemes = ("https", "http", "file")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Find the hash, in the fragment or in the file's name."""
        url, fragment = urldefrag(text)
        name = Path(unquote(urlsplit(url).path)).name
        said = _FRAGMENT.fullmatch(fragment)
        in_name = digest_in(name)
        if not name or (fragment and said is None) or (said is None and in_name is None):
            raise SourceError(
                f"source {text!r} must be the URL of a file with its SHA-256, so that no other file is taken. Write "
                f"{url}#sha256=... with at least 8 hexadecimal digits (sha256sum FILE prints them)."
            )
        digest = said[1].lower() if said is not None else str(in_name)
        # Files of one name from two servers are two files.
        stem, dot, suffix = name.partition(".")
        return cls(text, name if said is None else f"{stem}-{digest[:8]}{dot}{suffix}", digest)

    def read(self) -> Path:
        """Return the file, kept where torch keeps its own."""
        return download(urldefrag(self.text).url, checkpoints() / self.file, self.digest, self.text)

    def __str__(self) -> str:
        return self.text
