"""Checkpoints of one architecture under the same names: prefixes of wrappers, tied tensors, shapes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from conservtl.errors import SourceError
from conservtl.weights.checkpoints import Checkpoint
from conservtl.weights.interpolation import mixes

__all__ = ["aligned", "check_quantised", "is_quantised", "without_wrapper"]


def without_wrapper(first: Checkpoint, start: Checkpoint) -> Checkpoint:
    """Return the first model without a prefix that hides the source's names: of DataParallel, of a trainer.

    The names of a folder go with its configuration: there, only ``module.`` before all of them is removed.
    """
    prefix = "module."
    if first.folder is None:
        return first.matched(start.entries)
    wrapped = all(name.startswith(prefix) for name in first.entries)
    if not wrapped or any(name.startswith(prefix) for name in start.entries):
        return first
    return first.renamed({name.removeprefix(prefix): name for name in first.entries})


def aligned(other: Checkpoint, first: Checkpoint, fresh: set[str] | tuple[()]) -> Checkpoint:
    """Return a checkpoint under the first model's names, with its shapes.

    Raises:
        SourceError: a tensor is missing, left over or of another shape.
    """
    other = other.matched(first.entries)
    names = {name: name for name in first.entries if name in other.entries}
    for name in first.entries:
        if name not in names and name not in fresh:
            names[name] = _partner(name, first, other) or name
    missing = [name for name in names if names[name] not in other.entries]
    left = [
        name
        for name in other.entries
        if name not in first.entries and name not in fresh and _partner(name, other, first) is None
    ]
    for found, owner, lacks in ((missing, first, other), (left, other, first)):
        if found:
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            raise SourceError(
                f"all checkpoints must have each tensor; {found[0]!r}{more} of {owner.where} is not in {lacks.where}. "
                f"Merge models of one structure{_kept(found, owner.entries.keys() - set(found))}."
            )
    for name, old in names.items():
        shapes = first.entries[name].shape, other.entries[old].shape
        if name not in fresh and shapes[0] != shapes[1]:
            raise SourceError(
                f"all checkpoints must have one shape for each tensor; {name!r} has {shapes[0]} in {first.where} and "
                f"{shapes[1]} in {other.where}. Keep the first model's: fresh=[{name!r}] (--fresh)."
            )
    return other.renamed({name: old for name, old in names.items() if old in other.entries})


def _kept(names: Sequence[str], others: Iterable[str]) -> str:
    """Return the advice to keep the first model's tensors; empty for many names that no glob has alone."""
    if len(names) <= 4:
        return f", or keep the first model's: fresh={list(names)} (--fresh)"
    stem = names[0].rpartition(".")[0]
    while stem and not all(name.startswith(f"{stem}.") for name in names):
        stem = stem.rpartition(".")[0]
    alone = stem and not any(name.startswith(f"{stem}.") for name in others)
    return f", or keep the first model's: fresh=['{stem}.*'] (--fresh)" if alone else ""


def _partner(name: str, owner: Checkpoint, other: Checkpoint) -> str | None:
    """Return a name in ``other`` of a tensor that ``owner`` ties with this one, or holds twice; None without."""
    entry = owner.entries[name]
    shared = [one for one in owner.entries if one != name and one in other.entries and owner.entries[one] == entry]
    place = owner.memory.get(name)
    if place is not None and (tied := [one for one in shared if owner.memory.get(one) == place]):
        return tied[0]
    if math.prod(entry.shape) <= 1:  # counters are equal by chance
        return None
    value = owner.read(name) if shared else None
    return next((one for one in shared if value is not None and torch.equal(owner.read(one), value)), None)


def is_quantised(tensor: Tensor) -> bool:
    """Return whether a tensor holds floats of 8 bits, which mean something with their scales alone."""
    return tensor.is_floating_point() and tensor.dtype.itemsize == 1


def check_quantised(name: str, first: Tensor, checkpoints: Sequence[Checkpoint]) -> None:
    """Raise if integers of two dimensions, or floats of 8 bits, differ: quantised weights have no mean."""
    if not is_quantised(first) and (mixes(first) or first.ndim < 2):
        return
    for other in checkpoints:
        if name in other.entries and not _same_bits(other.read(name), first):
            raise SourceError(
                f"weights must be floating-point numbers; {name!r} holds {first.dtype} and differs between the "
                "checkpoints, as quantised weights do. Merge the weights from before quantisation, or keep the first "
                f"model's: fresh=[{name!r}] (--fresh)."
            )


def _same_bits(one: Tensor, other: Tensor) -> bool:
    same_form = (one.shape, one.dtype) == (other.shape, other.dtype)
    return same_form and torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
