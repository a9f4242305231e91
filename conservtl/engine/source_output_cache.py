"""The source model says the same of the same example every epoch: ask it once."""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conservtl.engine.batching import Batch, Held
from conservtl.functions import logits_of
from conservtl.plan.decision import View

__all__ = ["SourceOutputCache", "cache_source_outputs"]

_LIMIT = 2 << 30  # bytes kept in memory; beyond it they go into a file that is mapped
_CHUNK = 64  # examples at a time


class SourceOutputCache:
    """What the source model makes of every example of held data.

    Args:
        outputs: (N, ...) its outputs.
        features: layer -> (N, ...).
        device: of the batches.
        folder: where mapped files lie; it goes with this object.
    """

    def __init__(
        self,
        outputs: Tensor,
        features: Mapping[str, Tensor],
        device: torch.device,
        folder: tempfile.TemporaryDirectory[str] | None = None,
    ) -> None:
        self._outputs, self._features, self._device = outputs, features, device
        if folder is not None:
            weakref.finalize(self, folder.cleanup)

    def of(self, batch: Batch) -> View:
        """The examples of a batch."""
        index = batch.index
        if index is None:
            raise RuntimeError("a batch of held data has an index")

        def take(kept: Tensor) -> Tensor:
            return kept.index_select(0, index.to(kept.device)).to(self._device)

        return View(take(self._outputs), {layer: take(kept) for layer, kept in self._features.items()})


def cache_source_outputs(
    needs_source: bool, view: Callable[[Any], View | None], batches: Held
) -> SourceOutputCache | None:
    """Ask the source model about all examples once, in the order they are held.

    It runs in eval mode, so that nothing depends on the other examples of a batch. What does not fit into memory is
    kept in a temporary file and mapped.

    Args:
        needs_source: whether a term looks at the source model at all.
        view: batch content -> what the source model makes of it.
        batches: the training data, without augmentation.

    Returns:
        None where outputs or features are no tensors with an example a row.
    """
    if not needs_source:
        return None
    store: list[Tensor] = []
    folder: tempfile.TemporaryDirectory[str] | None = None
    layers: list[str] = []
    at = 0
    for index in torch.split(torch.arange(batches.length), _CHUNK):
        seen = view(batches.take(index))
        if seen is None:
            return None
        layers = list(seen.features)
        found = [logits_of(seen.outputs), *seen.features.values()]
        if any(not isinstance(tensor, Tensor) or tensor.shape[:1] != index.shape for tensor in found):
            return None
        if not store:
            size = sum(tensor[0].nbytes for tensor in found) * batches.length
            folder = tempfile.TemporaryDirectory(prefix="conservtl-") if size > _LIMIT else None
            store = [_room(tensor, batches.length, folder, number) for number, tensor in enumerate(found)]
        for room, tensor in zip(store, found, strict=True):
            room[at : at + len(index)] = tensor.to(room.device)
        at += len(index)
    return SourceOutputCache(store[0], dict(zip(layers, store[1:], strict=True)), batches.device, folder)


def _room(like: Tensor, length: int, folder: tempfile.TemporaryDirectory[str] | None, number: int) -> Tensor:
    """Room for an example a row: beside the batches, or in a mapped file."""
    shape = (length, *like.shape[1:])
    if folder is None:
        return torch.empty(shape, dtype=like.dtype, device=like.device)
    path = Path(folder.name) / f"{number}.bin"
    count = length * like[0].numel()
    return torch.from_file(str(path), shared=True, size=count, dtype=like.dtype).view(shape)
