"""Answers for files that are too long for one forward pass."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

from conservtl.batches import map_tensors
from conservtl.errors import DataError
from conservtl.tasks.base import Prediction

__all__ = ["predict_long"]


def predict_long(
    adapted: Any, files: Mapping[int, Path], skipped: MutableMapping[str, str] | None
) -> dict[int, Prediction]:
    """Return the answer for each file from its windows, one forward pass each.

    Args:
        adapted: the model; its preprocessing has ``windows``, and its task ``joined``.
        files: place -> file.
        skipped: gets the names of files that cannot be used, and why; None: they are errors.

    Raises:
        DataError: a file cannot be read.
    """
    found = {}
    for place, file in files.items():
        outputs, spans = [], []
        try:
            for span, inputs in adapted.preprocessing.windows(file):
                outputs.append(map_tensors(adapted.outputs(inputs), lambda tensor: tensor.cpu()))
                spans.append(span)
        except DataError as error:
            if skipped is None:
                raise
            skipped[str(file)] = str(error)
            continue
        found[place] = adapted.task.joined(outputs, spans, adapted.labels, file)
    return found
