"""Batches of any make: their tensors, and the same batch with others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from conservtl.errors import SpecError

__all__ = ["each", "replaced", "size_of", "tensors_of"]


def each(batch: Any, act: Callable[[Tensor], Tensor]) -> Any:
    """The batch with each of its tensors changed: tensors, mappings, tuples and lists, in any nesting."""
    if isinstance(batch, Tensor):
        return act(batch)
    if isinstance(batch, Mapping):
        return {key: each(value, act) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(each(value, act) for value in batch))
    return type(batch)(each(value, act) for value in batch) if isinstance(batch, (tuple, list)) else batch


def tensors_of(batch: Any) -> list[Tensor]:
    """The batch's tensors, in order."""
    found: list[Tensor] = []
    each(batch, lambda tensor: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
    return found


def replaced(batch: Any, tensors: Sequence[Tensor]) -> Any:
    """The batch with these tensors in place of its own."""
    left = iter(tensors)
    return each(batch, lambda _: next(left))


def size_of(batch: Any) -> int:
    """Number of examples in a batch.

    Raises:
        SpecError: its tensors disagree, so it cannot be taken apart.
    """
    lengths = [len(tensor) for tensor in tensors_of(batch) if tensor.ndim]
    if lengths and (len(set(lengths)) == 1 or lengths[0] == 1):
        return lengths[0]
    raise SpecError(
        f"batches: to be measured example by example, every tensor must have an example a row; received lengths "
        f"{lengths}. Give batches of one example."
    )
