"""Files of weights, read without executing code."""

from __future__ import annotations

import re
from collections.abc import Mapping
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any
from zipfile import ZipFile, is_zipfile

import torch

from conservtl.errors import SourceError, did_you_mean
from conservtl.source.folder import read_shards, weights_at
from conservtl.source.run_header import weights_file
from conservtl.storage.tensor_files import load_tensors

__all__ = ["load_file", "load_weights"]

_REFUSED = re.compile(r"GLOBAL (\S+) was not an allowed global")  # of torch.load with weights_only=True


def load_weights(path: Path) -> Mapping[str, Any]:
    """Return the entries of a file of weights, read without executing code, or of a folder or an index of such files.

    Raises:
        SourceError: the file is missing, damaged, of another kind, or would take far more memory than it has bytes.
    """
    path = weights_at(weights_file(path))
    return read_shards(path, load_file) if path.suffix == ".json" and path.is_file() else load_file(path)


def load_file(path: Path) -> Mapping[str, Any]:
    """Return the entries of one file, as ``load_weights`` does, whether or not it is one of several."""
    if not path.is_file():
        files = [file.name for file in path.parent.glob("*") if file.is_file()]
        raise SourceError(
            f"source {str(path)!r} is not a file.{did_you_mean(path.name, files, count=3)} "
            "Give the path of the source weights."
        )
    try:
        if path.suffix == ".safetensors":
            return load_tensors(path)
        _check_unpacked(path)
        # Mapped, so that large weights are not in memory twice; only torch's newer format can be.
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
    except SourceError:
        raise
    except Exception as error:
        if (found := _REFUSED.search(str(error))) is not None:
            raise SourceError(
                f"source {str(path)!r} must hold tensors and plain values; it holds an object of {found[1]}, whose "
                "code would have to be executed. Save the state dict alone, with torch.save(model.state_dict(), path) "
                "or as safetensors; if you trust the file, adapt within torch.serialization.safe_globals([...]) of "
                "that class."
            ) from error
        raise SourceError(
            f"source {str(path)!r} cannot be read as weights: {type(error).__name__}. The file is damaged, of another "
            "kind, or holds objects whose code would have to be executed. Save the state dict alone, with "
            "torch.save(model.state_dict(), path) or as safetensors."
        ) from error
    if not isinstance(loaded, Mapping):
        raise SourceError(f"source {str(path)!r} holds a {type(loaded).__name__}; a state dict is needed.")
    return loaded


def _check_unpacked(path: Path) -> None:
    """Raise if reading a file of torch's would take far more memory than the file has bytes.

    torch stores the parts of its archives without compression; of what its safe unpickler may call, ``bytearray(n)``
    alone makes something large of nothing.
    """
    where = f"source {path.name}"
    if not path.stat().st_size:
        return
    if not is_zipfile(path):
        with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as content:
            allocates = content.find(b"bytearray") >= 0
    else:
        with ZipFile(path) as archive:
            if any(part.file_size > part.compress_size for part in archive.infolist()):
                raise SourceError(f"{where}: an archive of weights must not be compressed. Save it with torch.save.")
            parts = [name for name in archive.namelist() if name.endswith(".pkl")]
            allocates = any(b"bytearray" in archive.read(name) for name in parts)
    if allocates:
        raise SourceError(f"{where}: it holds a bytearray, whose size has no bound. Save the state dict alone.")
