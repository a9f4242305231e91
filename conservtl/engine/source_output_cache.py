"""Cache of the source model's outputs: they are the same for each example in every epoch."""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conservtl.batches import rows_on, tensors_of
from conservtl.engine.batch import Batch
from conservtl.engine.draws import Draws
from conservtl.engine.held import Held
from conservtl.engine.randomness import preserve_rng, torch_states
from conservtl.errors import SpecError
from conservtl.functions import logits_of
from conservtl.padding import Padding
from conservtl.plan.term import View

__all__ = ["SourceOutputCache", "cache_source_outputs"]

_LIMIT = 2 << 30  # largest cache in memory, in bytes; a larger one is a memory-mapped file
_CHUNK = 64  # examples per batch


class SourceOutputCache:
    """Outputs and tapped features of the source model for all examples of held data.

    Args:
        outputs: (N, ...).
        features: layer -> (N, ...).
        padding: of all examples; None: nothing is padding.
        device: device of the batches.
        folder: folder of mapped files, deleted with this object.
    """

    def __init__(
        self,
        outputs: Tensor,
        features: Mapping[str, Tensor],
        padding: Padding | None,
        device: torch.device,
        folder: tempfile.TemporaryDirectory[str] | None = None,
    ) -> None:
        self._outputs, self._features, self._padding, self._device = outputs, features, padding, device
        if folder is not None:
            weakref.finalize(self, folder.cleanup)

    def of(self, batch: Batch) -> View:
        """Return the view of a batch."""
        index = batch.index
        if index is None:
            raise RuntimeError("a batch of held data has an index")
        padding = None if self._padding is None else self._padding.take(index)
        features = {layer: rows_on(self._device, cached, index) for layer, cached in self._features.items()}
        return View(rows_on(self._device, self._outputs, index), features, padding=padding)


def cache_source_outputs(
    needs_source: bool, view: Callable[[Any], View | None], batches: Held
) -> SourceOutputCache | None:
    """Run the source model once on all examples, in the order of the data.

    The source model runs in eval mode, so its outputs do not depend on the other examples of a batch. If it draws
    random numbers in eval mode, its outputs are computed in each step: from torch's generators if another draw gives
    other outputs, since a draw may be for layerdrop that eval mode leaves out. A cache that does not fit into memory is
    written to a temporary file and mapped.

    Returns:
        The cache; None if no term needs it, if outputs are random, or if outputs or features are not tensors with one
        row per example.
    """
    if not needs_source:
        return None
    with preserve_rng(), Draws() as draws:
        with draws.watching():
            cache = _filled(view, batches)
        return None if draws.found else cache


def _filled(view: Callable[[Any], View | None], batches: Held) -> SourceOutputCache | None:
    caches: list[Tensor] = []
    folder: tempfile.TemporaryDirectory[str] | None = None
    layers: list[str] = []
    paddings: list[Padding | None] = []
    start = 0
    for index in torch.split(torch.arange(batches.length), _CHUNK):
        part = _fixed(view, batches.take(index), batches.device)
        if part is None or part.passes > 1:
            return None
        if caches and layers != list(part.features):
            return None  # which layers run depends on the example
        layers = list(part.features)
        paddings.append(part.padding)
        try:
            tensors = [logits_of(part.outputs), *part.features.values()]
        except SpecError:  # other outputs: terms on features do not need them
            return None
        if any(tensor.shape[:1] != index.shape for tensor in tensors):
            return None
        if not caches:
            size = sum(tensor[0].nbytes for tensor in tensors) * batches.length
            folder = tempfile.TemporaryDirectory(prefix="conservtl-") if size > _LIMIT else None
            place = torch.device("cpu") if folder else batches.holding.room(size, batches.device)
            caches = [_allocate(one, batches.length, folder, number, place) for number, one in enumerate(tensors)]
        for cache, tensor in zip(caches, tensors, strict=True):
            cache[start : start + len(index)] = tensor.to(cache.device)
        start += len(index)
    known = [padding for padding in paddings if padding is not None]
    if known and len(known) < len(paddings):
        return None
    padding = Padding.joined(known) if known else None
    return SourceOutputCache(caches[0], dict(zip(layers, caches[1:], strict=True)), padding, batches.device, folder)


def _fixed(view: Callable[[Any], View | None], content: Any, device: torch.device) -> View | None:
    """Return the view of a batch; None if it depends on what is drawn from torch's generators."""
    before = torch_states(device)
    part = view(content)
    if part is None or all(map(torch.equal, before, torch_states(device))):
        return part
    again = view(content)
    first, second = (tensors_of((one.outputs, dict(one.features))) for one in (part, again or part))
    return part if len(first) == len(second) and all(map(torch.equal, first, second)) else None


def _allocate(
    like: Tensor, length: int, folder: tempfile.TemporaryDirectory[str] | None, number: int, place: torch.device
) -> Tensor:
    """Return an empty tensor of one row per example: on a device, or in a mapped file."""
    shape = (length, *like.shape[1:])
    if folder is None:
        last = like.ndim == 4 and not like.is_contiguous() and like.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if last else torch.contiguous_format
        return torch.empty(shape, dtype=like.dtype, device=place, memory_format=layout)
    path = Path(folder.name) / f"{number}.bin"
    count = length * like[0].numel()
    return torch.from_file(str(path), shared=True, size=count, dtype=like.dtype).view(shape)
