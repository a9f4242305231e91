"""A run's history for TensorBoard."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from conservtl.extras import require
from conservtl.report.text.metrics import number

__all__ = ["write_tensorboard"]


def write_tensorboard(history: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Write every number of a history as a scalar over epochs, such as ``target/accuracy``.

    Values that are no finite numbers are left out; files in TensorBoard's folder stay.

    Raises:
        MissingExtraError: tensorboard is not installed.
    """
    writer = require("torch.utils.tensorboard", "tensorboard").SummaryWriter(str(folder))
    try:
        for entry in history:
            for name, value in _scalars({key: item for key, item in entry.items() if key != "epoch"}):
                writer.add_scalar(name, value, global_step=int(entry["epoch"]))
    finally:
        writer.close()


def _scalars(entry: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, float]]:
    for key, item in entry.items():
        if isinstance(item, Mapping):
            yield from _scalars(item, f"{above}{key}/")
        elif (value := number(item)) is not None:
            yield f"{above}{key}", value
