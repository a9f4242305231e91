"""Batches of any make: their tensors, and the same batch with others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from conservtl.errors import DataError, SpecError

__all__ = ["check_batches", "each", "replaced", "size_of", "tensors_of"]


def check_batches(batches: Iterable[Any], who: str) -> None:
    """Refuse what is no collection of batches that can be gone through more than once.

    Raises:
        DataError: it is one batch, or a generator, which is empty after the first time.
    """
    one = isinstance(batches, (Tensor, Mapping)) or (
        isinstance(batches, tuple) and bool(batches) and all(isinstance(part, Tensor) for part in batches)
    )
    if one or isinstance(batches, Iterator):
        what = f"one batch, a {type(batches).__name__}" if one else f"a {type(batches).__name__}"
        fix = "Put it into a list" if one else "Make it a list, or give the DataLoader"
        raise DataError(
            f"{who}: batches must be a list of batches, or the like, to be gone through more than once; "
            f"received {what}. {fix}."
        )


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
