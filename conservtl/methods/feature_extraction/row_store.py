"""Rows gathered batch by batch: in memory, or beyond a limit in a file that is mapped."""

from __future__ import annotations

import tempfile
import weakref
from typing import Any

import numpy as np
from torch import Tensor

__all__ = ["RowStore"]

_LIMIT = 2 << 30  # bytes kept in memory


class RowStore:
    """A matrix that grows by rows.

    Args:
        limit: bytes in memory; beyond it all rows go into a temporary file without a name, which goes with the matrix.
    """

    def __init__(self, limit: int = _LIMIT) -> None:
        self._limit = limit
        self._held: list[Any] = []
        self._shape = (0, 0)
        self._file: Any = None

    def add(self, rows: Tensor) -> None:
        """More rows, (n, D); half precision becomes single."""
        wide = rows.detach() if rows.itemsize >= 4 else rows.detach().float()
        self._held.append(np.ascontiguousarray(wide.cpu().numpy()))
        self._shape = (self._shape[0] + len(wide), wide.shape[1])
        self._dtype = self._held[-1].dtype
        if self._dtype.itemsize * self._shape[0] * self._shape[1] > self._limit:
            if self._file is None:
                self._file = tempfile.TemporaryFile(prefix="conservtl-")  # noqa: SIM115 - closed with this object
                weakref.finalize(self, self._file.close)
            for held in self._held:
                self._file.write(held.data)
            self._held = []

    def matrix(self) -> Any:
        """All of them, an array that can be written to."""
        if self._file is None:
            return np.concatenate(self._held)
        self._file.flush()
        return np.memmap(self._file, self._dtype, "r+", shape=self._shape)
