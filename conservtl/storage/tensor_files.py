"""Files of tensors that are written atomically and carry a checksum of their content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from conservtl.errors import InputError, SourceError
from conservtl.storage.files import atomic_path

__all__ = [
    "DIGEST",
    "HEADER",
    "add_to_digest",
    "check_digest",
    "load_tensors",
    "opened",
    "read_header",
    "save_tensors",
]

HEADER = "conservtl"
"""Key of this package's content in the metadata of a file of safetensors."""
DIGEST = "sha256"
"""Key of the checksum in that content."""


def save_tensors(tensors: Mapping[str, Tensor], path: str | Path, header: Mapping[str, Any] | None = None) -> None:
    """Write tensors as safetensors, with a checksum in the header.

    Tensors may share memory. ``header`` is further content, which JSON can describe; ``read_header`` returns it.
    """
    # Cloned: safetensors refuses tensors that share memory.
    copies = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    with atomic_path(path) as temporary:
        # One entry: safetensors writes several in an order of its own, and equal runs must give equal files.
        save_file(copies, temporary, {HEADER: json.dumps({**(header or {}), DIGEST: _digest(copies)})})


def read_header(path: str | Path) -> dict[str, Any] | None:
    """Return the header that ``save_tensors`` was given; None for a file with none, or of another program.

    Raises:
        SourceError: the file cannot be read.
    """
    with opened(path) as file:
        return _parted(file.metadata())[0] or None


@contextmanager
def opened(path: str | Path) -> Iterator[Any]:
    """Open a file of safetensors, whose tensors are read when they are asked for.

    Raises:
        SourceError: it cannot be read, also later in the block.
    """
    try:
        with safe_open(path, "pt") as file:
            yield file
    except InputError:  # about the content, in the block
        raise
    except (SafetensorError, OSError, TypeError, ValueError, RecursionError) as error:
        said = str(error).rstrip(".")
        raise SourceError(
            f"{str(path)!r} cannot be read as weights: {said}. The file is damaged, or no safetensors file. Make or "
            "download it again."
        ) from error


def _parted(metadata: Mapping[str, str] | None) -> tuple[dict[str, Any], str | None]:
    """Return a file's header and its checksum."""
    header: Any = json.loads((metadata or {}).get(HEADER, "{}"))
    if not isinstance(header, dict):
        raise TypeError(f"its header must be a JSON object; received a {type(header).__name__}")
    return header, header.pop(DIGEST, None)


def load_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read tensors, and compare their checksum if the file has one.

    Raises:
        SourceError: it cannot be read, or its content has changed since it was written.
    """
    with opened(path) as file:
        expected = _parted(file.metadata())[1]
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    if expected is not None and _digest(tensors) != expected:
        raise _damaged(path)
    return tensors


def check_digest(path: str | Path) -> None:
    """Compare a file with its checksum, if it has one, with one tensor in memory at a time.

    Raises:
        SourceError: it cannot be read, or its content has changed since it was written.
    """
    with opened(path) as file:
        expected = _parted(file.metadata())[1]
        if expected is None:
            return
        digest = hashlib.sha256()
        for name in sorted(file.keys()):
            add_to_digest(digest, name, file.get_tensor(name))
    if digest.hexdigest() != expected:
        raise _damaged(path)


def add_to_digest(digest: Any, name: str, tensor: Tensor) -> None:
    """Add name, type, shape and values of a tensor to a hash of ``hashlib``; tensors are added by sorted names."""
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
    digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        add_to_digest(digest, name, tensor)
    return digest.hexdigest()


def _damaged(path: str | Path) -> SourceError:
    return SourceError(
        f"{str(path)!r} must have the content it was written with; its checksum differs. The file is damaged: make it "
        "again."
    )
