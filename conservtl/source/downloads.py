"""Downloads: announced with their size, checked by their hash, and kept where torch keeps its own."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import torch

from conservtl.errors import SourceError, counted
from conservtl.storage.files import file_digest

__all__ = ["announce", "checkpoints", "digest_in", "download", "download_published", "one_line"]

_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.")  # as torch.hub reads it
_PATIENCE = 30  # seconds to wait for a server's first answer


def checkpoints() -> Path:
    """Return the folder in which torch keeps downloaded weights."""
    return Path(torch.hub.get_dir()) / "checkpoints"


def announce(name: str, size: int | None, where: Path) -> None:
    """Tell on stderr that a download begins."""
    sys.stderr.write(f"conservtl: downloading {name} ({_shown(size)}) to {where}\n")


def digest_in(file: str) -> str | None:
    """Return the beginning of the SHA-256 that a file's name holds, as ``resnet18-f37072fd.pth`` does; None if none."""
    found = _IN_NAME.search(file)
    return None if found is None else found[1]


def download_published(url: str, name: str) -> Path:
    """Return the path of a file that a library publishes, downloaded to where that library looks for it."""
    file = Path(urlsplit(url).path).name
    return download(url, checkpoints() / file, digest_in(file), name)


def download(url: str, path: Path, digest: str | None, name: str) -> Path:
    """Return the path of a file, downloaded if it is not there.

    ``digest`` is the beginning of the file's SHA-256 in hexadecimal digits, if it is known.

    Raises:
        SourceError: the file cannot be downloaded, or has another hash.
    """
    if path.is_file():
        if digest is not None and not (found := file_digest(path)).startswith(digest):
            raise SourceError(
                f"source {name}: {path} must have the SHA-256 {digest}; it has {found[: len(digest)]}. Delete it, so "
                "that it is downloaded again."
            )
        return path
    try:
        announce(name, _size(url), path)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), digest, progress=sys.stderr.isatty())
    except RuntimeError as error:  # torch's for another hash
        raise SourceError(
            f"source {name}: {url} holds another file: {error}. Correct the hash or the URL; repeat a download that "
            "was cut off."
        ) from error
    except (OSError, ValueError) as error:
        raise SourceError(
            f"source {name}: {url} cannot be downloaded ({one_line(error)}). Download {path.name} on another machine "
            f"and put it at {path}"
        ) from error
    return path


def one_line(error: Exception) -> str:
    """Return an error's type and the first line of its message."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _size(url: str) -> int | None:
    """Return the length of the file that a server announces; None if it tells none."""
    # references/url.py checks the scheme.
    with urlopen(Request(url, method="HEAD"), timeout=_PATIENCE) as answer:  # noqa: S310 # nosec B310
        length = answer.headers.get("Content-Length")
    return None if length is None else int(length)


def _shown(size: int | None) -> str:
    if size is None:
        return "of unknown size"
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return counted(size, "byte")
