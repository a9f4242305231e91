"""Rows of a matrix, collected batch by batch in memory, or in a mapped file above a limit."""

from __future__ import annotations

import tempfile
import weakref
from typing import Any

import numpy as np
from torch import Tensor

__all__ = ["RowStore"]

_LIMIT = 2 << 30  # bytes


class RowStore:
    """A matrix that grows by rows.

    Args:
        limit: bytes to keep in memory. Above it all rows are written to an unnamed temporary file, which is deleted
            with the matrix.
    """

    def __init__(self, limit: int = _LIMIT) -> None:
        self._limit = limit
        self._buffer: list[Any] = []
        self._shape = (0, 0)
        self._file: Any = None

    def add(self, rows: Tensor) -> None:
        """Append rows (n, D); half precision becomes single."""
        wide = rows.detach() if rows.itemsize >= 4 else rows.detach().float()
        self._buffer.append(np.ascontiguousarray(wide.cpu().numpy()))
        self._shape = (self._shape[0] + len(wide), wide.shape[1])
        self._dtype = self._buffer[-1].dtype
        if self._dtype.itemsize * self._shape[0] * self._shape[1] > self._limit:
            if self._file is None:
                self._file = tempfile.TemporaryFile(prefix="conservtl-")  # noqa: SIM115 - closed with this object
                weakref.finalize(self, self._file.close)
            for block in self._buffer:
                self._file.write(block.data)
            self._buffer = []

    def matrix(self) -> Any:
        """Return all rows as a writable array."""
        if self._file is None:
            return np.concatenate(self._buffer)
        self._file.flush()
        return np.memmap(self._file, self._dtype, "r+", shape=self._shape)
