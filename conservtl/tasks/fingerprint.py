"""Cheap fingerprints of data: names, sizes and modification times of files instead of their content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import torch

from conservtl.data import Data, Examples

__all__ = ["digest_of_files", "digest_of_names"]


def digest_of_names(data: Data) -> str:
    """Return a digest of the names and labels of the examples, in order; no example is decoded."""
    labels = data.labels if isinstance(data, Examples) else getattr(data, "labels", ())
    values = torch.as_tensor(labels).tolist() if len(labels) else []
    return hashlib.sha256(json.dumps([list(getattr(data, "names", ())), values]).encode()).hexdigest()


def digest_of_files(files: Iterable[Path]) -> str:
    """Return a digest of the names, sizes and modification times of files; a missing one counts as such."""
    digest = hashlib.sha256()
    for file in files:
        try:
            status = file.stat()
            entry = [str(file), status.st_size, status.st_mtime_ns]
        except OSError:
            entry = [str(file)]
        digest.update(json.dumps(entry).encode())
    return digest.hexdigest()
