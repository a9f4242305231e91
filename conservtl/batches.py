"""Batches of any nesting: list, replace, move and count their tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from conservtl.compat import tree_leaves, tree_map
from conservtl.errors import DataError, SpecError

__all__ = [
    "as_tensor",
    "batch_size",
    "check_batches",
    "map_tensors",
    "replace_tensors",
    "row_count",
    "rows_on",
    "take_rows",
    "tensors_of",
    "to_device",
]


def as_tensor(value: Any) -> Any:
    """Return a NumPy array, a number or nested lists of numbers as a tensor; everything else as it is.

    float64 arrays become torch's default type, because NumPy makes them without being asked.

    >>> as_tensor([[1, 2], [3, 4]]).shape
    torch.Size([2, 2])
    """
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        large = value.dtype.itemsize > {"f": 4, "u": 1}.get(value.dtype.kind, 16)
        kind: Any = {"f": np.float64, "u": np.int64}[value.dtype.kind] if large else value.dtype.newbyteorder("=")
        tensor = torch.from_numpy(np.require(value, kind, ["C", "W"]))
        return tensor.to(torch.get_default_dtype()) if kind is np.float64 else tensor
    if isinstance(value, (list, tuple, int, float)):
        with suppress(TypeError, ValueError, RuntimeError):
            return torch.as_tensor(value)
    return value


def check_batches(batches: Iterable[Any], subject: str) -> None:
    """Raise unless ``batches`` can be iterated repeatedly.

    Raises:
        DataError: it is a single batch, or an iterator, which is empty after the first pass.
    """
    single = isinstance(batches, (Tensor, Mapping)) or (
        isinstance(batches, tuple) and bool(batches) and all(isinstance(part, Tensor) for part in batches)
    )
    if single or isinstance(batches, Iterator) or not hasattr(type(batches), "__iter__"):
        received = f"one batch, a {type(batches).__name__}" if single else f"a {type(batches).__name__}"
        fix = "Put it into a list" if single else "Make it a list, or give the DataLoader"
        raise DataError(
            f"{subject}: batches must be a list or another collection that can be iterated repeatedly; "
            f"received {received}. {fix}."
        )


def map_tensors(batch: Any, function: Callable[[Tensor], Any]) -> Any:
    """Return the batch with ``function`` applied to each tensor.

    Tuples, named tuples, lists, dictionaries, dataclasses and the types registered with torch's pytree may nest in any
    way and keep their types; another mapping becomes a dictionary. Everything else is returned as it is.

    >>> map_tensors({"inputs": [torch.ones(2)], "names": ["a", "b"]}, lambda tensor: tensor + 1)
    {'inputs': [tensor([2., 2.])], 'names': ['a', 'b']}
    """
    return _map(batch, lambda node: isinstance(node, Tensor), function)


def tensors_of(batch: Any) -> list[Tensor]:
    """Return the tensors of a batch, in order."""
    return list(_leaves(batch, lambda node: isinstance(node, Tensor)))


def replace_tensors(batch: Any, tensors: Sequence[Tensor]) -> Any:
    """Return the batch with these tensors, in the order of ``tensors_of``, in place of its tensors."""
    remaining = iter(tensors)
    return map_tensors(batch, lambda _: next(remaining))


def to_device(batch: Any, device: torch.device) -> Any:
    """Return the batch on a device; copies from pinned memory do not block.

    An object with a ``to`` method, such as ``PackedSequence`` or a tokenizer's ``BatchEncoding``, moves itself. NumPy
    arrays of numbers become tensors.
    """

    def moved(node: Any) -> Any:
        if isinstance(node, np.ndarray) and isinstance(node := as_tensor(node), np.ndarray):
            return node  # of words
        return node.to(device, non_blocking=True)

    return _map(batch, _moves, moved)


def batch_size(batch: Any) -> int:
    """Return the number of examples: the length of the first tensor with dimensions, 1 for a batch without one."""
    for leaf in _leaves(batch, lambda node: isinstance(node, (Tensor, PackedSequence))):
        if isinstance(leaf, PackedSequence):
            return int(leaf.batch_sizes[0])
        if leaf.ndim:
            return len(leaf)
    return 1


def row_count(batch: Any) -> int:
    """Return the number of examples of a batch that can be split into rows.

    Raises:
        SpecError: its tensors differ in length.
    """
    lengths = [len(tensor) for tensor in tensors_of(batch) if tensor.ndim]
    if lengths and (len(set(lengths)) == 1 or lengths[0] == 1):
        return lengths[0]
    raise SpecError(
        f"batches: to be measured example by example, every tensor must have one row for each example; received "
        f"lengths {lengths}. Give batches of one example."
    )


def take_rows(tensor: Tensor, index: Tensor) -> Tensor:
    """Return the rows at these positions, in the tensor's layout: ``index_select`` alone drops channels last."""
    if tensor.ndim == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last):
        return tensor.permute(0, 2, 3, 1).index_select(0, index).permute(0, 3, 1, 2)
    return tensor.index_select(0, index)


def rows_on(device: torch.device, tensor: Tensor, index: Tensor) -> Tensor:
    """Return the rows at positions that the host knows on a device; the host waits for none of its work.

    The tensor is on the device, or held by the host.
    """
    rows = take_rows(tensor, index.to(tensor.device, non_blocking=index.device.type == "cpu"))
    if device.type == "cuda" and rows.device.type == "cpu":
        rows = rows.pin_memory()
    return rows.to(device, non_blocking=True)


def _leaves(batch: Any, is_leaf: Callable[[Any], bool]) -> Iterator[Any]:
    """Yield the nodes that are leaves, also below containers that torch's pytree does not know."""
    if type(batch) in (tuple, list) and all(map(is_leaf, batch)):  # most batches; torch's pytree takes long for them
        yield from batch
        return
    for node in tree_leaves(batch, is_leaf=is_leaf):
        if is_leaf(node):
            yield node
        elif isinstance(node, Mapping):
            yield from _leaves(list(node.values()), is_leaf)
        elif isinstance(node, (tuple, list)):
            yield from _leaves(list(node), is_leaf)
        elif is_dataclass(node) and not isinstance(node, type):
            yield from _leaves(list(_fields(node).values()), is_leaf)


def _map(batch: Any, is_leaf: Callable[[Any], bool], function: Callable[[Any], Any]) -> Any:
    """Apply ``function`` to the nodes that are leaves, also below containers that torch's pytree does not know."""
    if type(batch) in (tuple, list) and all(map(is_leaf, batch)):  # most batches; torch's pytree takes long for them
        return type(batch)(map(function, batch))

    def visit(node: Any) -> Any:
        if is_leaf(node):
            return function(node)
        if isinstance(node, Mapping):
            return {key: _map(value, is_leaf, function) for key, value in node.items()}
        if isinstance(node, (tuple, list)):
            make = getattr(type(node), "_make", type(node))  # a named tuple's constructor takes no iterable
            return make(_map(value, is_leaf, function) for value in node)
        if is_dataclass(node) and not isinstance(node, type):
            return replace(node, **{name: _map(value, is_leaf, function) for name, value in _fields(node).items()})
        return node

    return tree_map(visit, batch, is_leaf=is_leaf)


def _moves(node: Any) -> bool:
    return callable(getattr(node, "to", None)) or isinstance(node, np.ndarray)


def _fields(node: Any) -> dict[str, Any]:
    return {field.name: getattr(node, field.name) for field in fields(node) if field.init}
