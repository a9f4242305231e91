"""Safetensors written tensor by tensor, for files larger than memory."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from conservtl.storage.files import atomic_path
from conservtl.storage.tensor_files import DIGEST, HEADER, add_to_digest

__all__ = ["CODES", "Entry", "write_tensors"]

_CODES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2": "F8_E5M2",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "complex64": "C64",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
}
CODES: dict[torch.dtype, str] = {getattr(torch, name): code for name, code in _CODES.items()}
"""Types that safetensors can hold, with their names there."""


@dataclass(frozen=True)
class Entry:
    """A tensor's type and shape."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes of its values."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


def write_tensors(
    path: Path, entries: Mapping[str, Entry], tensor: Callable[[str], Tensor], metadata: Mapping[str, str]
) -> None:
    """Write a file of safetensors with one tensor in memory at a time, atomically.

    Args:
        path: file to create or replace.
        entries: types and shapes of all tensors by name.
        tensor: name -> tensor of that type and shape, on the CPU; called once for each name, in their order.
        metadata: texts for the file's header. The checksum of a header of ``save_tensors`` is made anew.

    Raises:
        WriteError: the disk is full, or the folder is read-only or gone; the old file is unchanged.
    """
    saved = json.loads(metadata[HEADER]) if HEADER in metadata else None
    empty = hashlib.sha256()
    offsets = _offsets(entries)
    with atomic_path(path) as temporary, temporary.open("r+b") as file:
        begin = file.write(_header(entries, offsets, _signed(metadata, saved, empty.hexdigest())))
        digest = hashlib.sha256()
        for name in sorted(entries):
            value = tensor(name)
            if (value.dtype, tuple(value.shape)) != (entries[name].dtype, entries[name].shape):
                raise TypeError(f"{name!r} must be {entries[name]}; received {value.dtype} {tuple(value.shape)}.")
            file.seek(begin + offsets[name])
            file.write(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            if saved is not None:
                add_to_digest(digest, name, value)
        file.seek(0)  # checksums have one length, so that the header's does not change
        file.write(_header(entries, offsets, _signed(metadata, saved, digest.hexdigest())))


def _signed(metadata: Mapping[str, str], saved: dict[str, object] | None, digest: str) -> dict[str, str]:
    return {**metadata} if saved is None else {**metadata, HEADER: json.dumps({**saved, DIGEST: digest})}


def _offsets(entries: Mapping[str, Entry]) -> dict[str, int]:
    """Return where each tensor begins: wide types first, so that every one is aligned."""
    offsets, end = {}, 0
    for name in sorted(entries, key=lambda name: (-entries[name].dtype.itemsize, name)):
        offsets[name] = end
        end += entries[name].size
    return offsets


def _header(entries: Mapping[str, Entry], offsets: Mapping[str, int], metadata: Mapping[str, str]) -> bytes:
    described: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    for name in sorted(offsets, key=offsets.__getitem__):
        entry = entries[name]
        place = [offsets[name], offsets[name] + entry.size]
        described[name] = {"dtype": CODES[entry.dtype], "shape": list(entry.shape), "data_offsets": place}
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
