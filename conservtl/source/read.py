"""Source weights: read without executing code, with their names matched to the model's."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from conservtl.errors import SourceError, did_you_mean
from conservtl.layers import Layer, canonical, unwrap

__all__ = ["Source", "SourceLike", "read_source"]


SourceLike = str | Path | Mapping[str, Any] | nn.Module
"""A path to weights, a state dict (wrapped or not), or a model."""

_WRAPPERS = ("state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "model.")  # torch.compile's prefix is removed before: names are canonical


@dataclass(frozen=True)
class Source:
    """Source tensors by name.

    Args:
        tensors: name -> tensor.
        where: name of the source in messages.
        notes: entries that were unwrapped or ignored, and the prefix that was stripped.
        module: the source model, if the source is a model.
    """

    tensors: dict[str, Tensor]
    where: str
    notes: tuple[str, ...] = ()
    module: nn.Module | None = None

    def matched(self, names: Iterable[str]) -> Source:
        """Return the source without the prefix that hides most of the model's names.

        Args:
            names: names of the model's parameters and buffers.

        Raises:
            SourceError: no name matches, with or without a prefix, or two names become one.
        """
        known = set(names)
        best, matches = "", -1
        for prefix in _candidates(self.tensors):
            count = len({name.removeprefix(prefix) for name in self.tensors} & known)
            if count > matches:
                best, matches = prefix, count
        if matches <= 0:
            raise SourceError(
                f"{self.where}: its {len(self.tensors)} tensors must share names with the model; none does, so nothing "
                f"would be loaded. The source has {_some(self.tensors)}; the model has {_some(known)}. "
                f"Rename the keys, or load the file into the model it was saved from and pass that model."
            )
        notes = self.notes + ((f"stripped the prefix {best!r}",) if best else ())
        tensors: dict[str, Tensor] = {}
        for name, tensor in self.tensors.items():
            short = name.removeprefix(best)
            if short in tensors:
                raise SourceError(
                    f"{self.where}: names must be unique; {short!r} and {best + short!r} both mean {short!r}. "
                    "Remove one of them and pass the state dict."
                )
            tensors[short] = tensor
        return Source(tensors, self.where, notes, self.module)

    def values_of(self, layers: Sequence[Layer]) -> dict[str, Tensor]:
        """Return parameter name -> source tensor; a tied parameter is found under any of its names."""
        values = {}
        for info in (info for layer in layers for info in layer.parameters):
            name = next((name for name in (info.name, *info.aliases) if name in self.tensors), None)
            if name is not None:
                values[info.name] = self.tensors[name]
        return values

    def check_finite(self, other_than: Collection[str] = ()) -> None:
        """Raise unless all values are finite.

        Args:
            other_than: names of tensors that may hold other values: an attention mask is infinite by design.

        Raises:
            SourceError: a tensor holds NaN or infinity; the message names it.
        """
        for name, tensor in self.tensors.items():
            if name not in other_than and tensor.is_floating_point() and not torch.isfinite(tensor).all():
                count = int((~torch.isfinite(tensor)).sum())
                raise SourceError(
                    f"{self.where}: values must be finite; tensor {name!r} holds {count} values that are NaN or "
                    "infinite. Save the source again from a run that did not diverge."
                )


def read_source(source: SourceLike) -> Source:
    """Read source weights without executing code from a file.

    Args:
        source: a path (``.safetensors``, or ``.pt``, ``.pth``, ``.th``, ``.bin`` read with
            ``weights_only=True``), a state dict, a dictionary that wraps one, or a model.

    Raises:
        SourceError: the file is missing or unreadable, or holds no tensors.
    """
    if isinstance(source, nn.Module):
        model = unwrap(source)
        return Source(_tensors(model.state_dict()), f"source {type(model).__name__}", module=model)
    if isinstance(source, Mapping):
        return _unwrap_entries(source, "source state dict")
    if isinstance(source, (str, Path)):
        path = Path(source)
        return _unwrap_entries(_load(path), f"source {path.name}")
    raise SourceError(f"source must be a path, a state dict or a torch.nn.Module; received {type(source).__name__}.")


def _load(path: Path) -> Mapping[str, Any]:
    if path.is_dir() and (path / "model.safetensors").is_file():
        path = path / "model.safetensors"  # the folder of a run
    if not path.is_file():
        files = [file.name for file in path.parent.glob("*") if file.is_file()]
        raise SourceError(
            f"source {str(path)!r} is not a file.{did_you_mean(path.name, files, count=3)} "
            "Give the path of the source weights."
        )
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise SourceError(
            f"source {str(path)!r} cannot be read as weights: {type(error).__name__}. The file is damaged, of another "
            "kind, or holds objects whose code would have to be executed. Save the state dict alone, with "
            "torch.save(model.state_dict(), path) or as safetensors."
        ) from error
    if not isinstance(loaded, Mapping):
        raise SourceError(f"source {str(path)!r} holds a {type(loaded).__name__}; a state dict is needed.")
    return loaded


def _unwrap_entries(entries: Mapping[str, Any], where: str) -> Source:
    notes: list[str] = []
    while True:
        key = next((k for k in _WRAPPERS if isinstance(entries.get(k), Mapping)), None)
        if key is None:
            break
        others = sorted(str(k) for k in entries if k != key)
        notes.append(f"took the entry {key!r}" + (f", ignored {', '.join(others[:6])}" if others else ""))
        entries = entries[key]
    tensors = _tensors(entries)
    if others := sorted(str(k) for k, v in entries.items() if not isinstance(v, Tensor)):
        notes.append(f"ignored entries that are not tensors: {', '.join(others[:6])}")
    if not tensors:
        raise SourceError(f"{where} holds no tensors (entries: {_some(map(str, entries))}); a state dict is needed.")
    return Source(tensors, where, tuple(notes))


def _tensors(entries: Mapping[str, Any]) -> dict[str, Tensor]:
    return {canonical(str(name)): value.detach() for name, value in entries.items() if isinstance(value, Tensor)}


def _candidates(names: Iterable[str]) -> list[str]:
    """Return the prefixes to try, shortest first: none, and each sequence of known prefixes that occurs."""
    prefixes = [""]
    for prefix in prefixes:
        longer = [prefix + known for known in _PREFIXES]
        prefixes += [p for p in longer if p.count(".") <= 3 and any(name.startswith(p) for name in names)]
    return sorted(prefixes, key=len)


def _some(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return ", ".join(repr(name) for name in ordered[:4]) + (", …" if len(ordered) > 4 else "")
