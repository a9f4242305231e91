"""Which dictionary of a checkpoint holds the weights, and its tensors by canonical name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from conservtl.errors import SourceError, agreeing, counted, did_you_mean
from conservtl.layers import canonical
from conservtl.source.kinds import has_values

__all__ = ["KNOWN_KEYS", "amount", "some", "tensors_of", "weights_in"]

_NAME = 1000
_REPEATED = 2**24  # bytes that a tensor may have more than the file, as buffers of repeated values do
KNOWN_KEYS = ("state_dict", "model_state_dict", "model", "module")
"""Keys under which checkpoints hold the trained weights, in the order in which they are preferred."""


def weights_in(entries: Mapping[str, Any], where: str, key: str | None = None) -> tuple[Mapping[str, Any], list[str]]:
    """Return the dictionary that holds the weights, and remarks on what was taken and left.

    Without ``key``, at each level: the first of ``KNOWN_KEYS`` that holds a dictionary; else the entries themselves if
    they are tensors; else the only dictionary of tensors among them.

    Raises:
        SourceError: there is no such entry, or several dictionaries hold tensors and none is known to be preferred.
    """
    notes: list[str] = []
    if key is not None:
        entries = _entry(entries, key, where)
        notes.append(f"took the entry {key!r}")
    passed = {id(entries)}
    while (name := _choice(entries, where)) is not None:
        if id(entries[name]) in passed:
            raise SourceError(f"{where}: its entry {name!r} holds itself; a state dict is needed.")
        passed.add(id(entries[name]))
        others = sorted(str(other) for other in entries if other != name)
        weights = sorted(repr(path) for path in _paths({key: one for key, one in entries.items() if key != name}))
        left = f", ignored {', '.join(others[:6])}" if others else ""
        choose = f"; {' and '.join(weights[:4])} {agreeing(len(weights), 'holds')} weights too (key=...)"
        notes.append(f"took the entry {name!r}{left}{choose if weights else ''}")
        entries = entries[name]
    return entries, notes


def tensors_of(entries: Mapping[str, Any], where: str, notes: list[str]) -> dict[str, Tensor]:
    """Return canonical name -> tensor; entries that are no tensors are added to the notes.

    Raises:
        SourceError: there are no tensors, layers are stored in a quantised module's packed form, or a tensor claims far
            more values than the file holds.
    """
    others = sorted(str(name) for name, value in entries.items() if not isinstance(value, Tensor))
    if packed := [name for name in others if name.endswith("_packed_params")]:
        raise SourceError(
            f"{where}: values must be ordinary floating-point tensors; {packed[0]!r} is the packed weight of a "
            "quantised layer. Take the weights from before quantisation."
        )
    if others:
        notes.append(f"ignored entries that are not tensors: {', '.join(others[:6])}")
    for name, value in entries.items():
        if isinstance(value, Tensor):
            _check_size(str(name), value, where)
    tensors = {canonical(str(name)): value.detach() for name, value in entries.items() if isinstance(value, Tensor)}
    if not tensors:
        raise SourceError(f"{where} holds no tensors (entries: {some(map(str, entries))}); a state dict is needed.")
    return tensors


def _check_size(name: str, tensor: Tensor, where: str) -> None:
    """Raise if a tensor's name is endless, or if it repeats few values (stride 0) to many."""
    if len(name) > _NAME:
        raise SourceError(f"{where}: names have at most {_NAME:,} characters; {name[:40]!r}... has {len(name):,}.")
    size = tensor.numel() * tensor.element_size()
    if size > _REPEATED and has_values(tensor) and size > tensor.untyped_storage().nbytes():
        raise SourceError(
            f"{where}: a tensor's values must be in the file; {name!r} claims {counted(size, 'byte')} and the file "
            f"holds {tensor.untyped_storage().nbytes():,} for it. Save tensor.contiguous(), if the weights are to be "
            "trusted."
        )


def amount(names: Iterable[str], tensors: Mapping[str, Tensor]) -> str:
    """Return how many values some tensors have, of those of all, and which of them are the largest."""
    left = sorted(names, key=lambda name: -tensors[name].numel())
    count, every = (sum(tensors[name].numel() for name in chosen) for chosen in (left, tensors))
    largest = ", ".join(f"{name} {tuple(tensors[name].shape)}" for name in left[:3])
    return f"{count:,} of {counted(every, 'value')} ({'the largest ' * (len(left) > 3)}{largest})"


def some(names: Iterable[str]) -> str:
    """Return the first names in alphabetical order, quoted."""
    ordered = sorted(names)
    return ", ".join(repr(name) for name in ordered[:4]) + (", …" if len(ordered) > 4 else "")


def _entry(entries: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    """Return the entry of a key that may be a dotted path."""
    value: Any = entries.get(key)
    if value is None:
        value = entries
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
    if not isinstance(value, Mapping):
        known = [name for name in map(str, entries) if isinstance(entries.get(name), Mapping)]
        near = did_you_mean(key, known, count=3)
        raise SourceError(
            f"{where}: key must name an entry that holds a dictionary; received {key!r}."
            + (f"{near} The source has {some(known)}." if known else " The source has none: leave key out.")
        )
    return value


def _choice(entries: Mapping[str, Any], where: str) -> str | None:
    """Return the key of the entry to go on with; None if the entries are the weights themselves."""
    for key in KNOWN_KEYS:
        if isinstance(entries.get(key), Mapping):
            return key
    if any(_is_weight(value) for value in entries.values()):
        return None
    candidates = [name for name, value in entries.items() if _holds_weights(value)]
    if len(candidates) > 1:
        raise SourceError(
            f"{where}: one dictionary of weights must be chosen; it holds {len(candidates)}: "
            f"{', '.join(map(repr, candidates[:6]))}. Name one: key={candidates[0]!r} (in a spec, source.key)."
        )
    return candidates[0] if candidates else None


def _paths(entries: Mapping[str, Any]) -> list[str]:
    """Return the keys, also those of nested entries, that hold dictionaries of weights."""
    found = []
    for key, value in entries.items():
        if _holds_weights(value):
            found.append(str(key))
        elif isinstance(value, Mapping):
            found += [f"{key}.{inner}" for inner, nested in value.items() if _holds_weights(nested)]
    return found


def _holds_weights(value: Any, within: tuple[int, ...] = ()) -> bool:
    """Return whether a value is a dictionary of named weights, itself or in an entry of a known key."""
    if not isinstance(value, Mapping) or id(value) in within:
        return False
    if any(isinstance(name, str) and _is_weight(tensor) for name, tensor in value.items()):
        return True
    return any(_holds_weights(value.get(key), (*within, id(value))) for key in KNOWN_KEYS)


def _is_weight(value: Any) -> bool:
    """Return whether a value is a tensor of some dimension: scalars, such as the best accuracy, are no weights."""
    return isinstance(value, Tensor) and value.ndim > 0
