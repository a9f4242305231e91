"""Source weights: read safely, matched by name and shape, with a report of what went where."""

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
_PREFIXES = ("module.", "model.")  # torch.compile's is gone by then: names are canonical


@dataclass(frozen=True)
class Source:
    """Source tensors by name, with what was found around them.

    Args:
        tensors: name -> tensor, prefixes as found.
        where: how messages name the source.
        notes: what was unwrapped, stripped or left aside.
        module: the source model, where one was given.
    """

    tensors: dict[str, Tensor]
    where: str
    notes: tuple[str, ...] = ()
    module: nn.Module | None = None

    def matched(self, names: Iterable[str]) -> Source:
        """The same source with the prefix stripped that makes most of its names known.

        Args:
            names: the names the model has for its parameters and buffers.

        Raises:
            SourceError: no name fits, whatever is stripped.
        """
        known = set(names)
        best, hits = "", -1
        for prefix in _candidates(self.tensors):
            count = len({name.removeprefix(prefix) for name in self.tensors} & known)
            if count > hits:
                best, hits = prefix, count
        if hits <= 0:
            raise SourceError(
                f"{self.where}: none of its {len(self.tensors)} tensors has a name that the model knows; nothing "
                f"would be loaded. It holds {_some(self.tensors)}; the model has {_some(known)}. "
                f"Rename the keys, or load it into the model it was saved from and pass that."
            )
        notes = self.notes + ((f"stripped the prefix {best!r}",) if best else ())
        tensors: dict[str, Tensor] = {}
        for name, tensor in self.tensors.items():
            short = name.removeprefix(best)
            if short in tensors:
                raise SourceError(
                    f"{self.where}: {short!r} and {best + short!r} both stand for {short!r}. "
                    "Keep the one that is meant, and pass that state dict."
                )
            tensors[short] = tensor
        return Source(tensors, self.where, notes, self.module)

    def values_of(self, layers: Sequence[Layer]) -> dict[str, Tensor]:
        """Parameter name -> its source tensor; a tied parameter may stand there under any of its names."""
        found = {}
        for info in (info for layer in layers for info in layer.parameters):
            name = next((name for name in (info.name, *info.aliases) if name in self.tensors), None)
            if name is not None:
                found[info.name] = self.tensors[name]
        return found

    def check_finite(self, other_than: Collection[str] = ()) -> None:
        """Refuse NaN and infinity.

        Args:
            other_than: names that may hold them: an attention mask is infinite by design.

        Raises:
            SourceError: a tensor holds one; the message names it.
        """
        for name, tensor in self.tensors.items():
            if name not in other_than and tensor.is_floating_point() and not torch.isfinite(tensor).all():
                bad = int((~torch.isfinite(tensor)).sum())
                raise SourceError(
                    f"{self.where}: tensor {name!r} holds {bad} values that are NaN or infinite. A model cannot "
                    "be conserved from it: save the source again from a run that did not diverge."
                )


def read_source(source: SourceLike) -> Source:
    """Read source weights without executing anything that a file brings along.

    Args:
        source: a path (``.safetensors``, or ``.pt``, ``.pth``, ``.th``, ``.bin`` read with
            ``weights_only=True``), a state dict, a dictionary that wraps one, or a model.

    Raises:
        SourceError: the file is missing or unreadable, or there are no tensors in it.
    """
    if isinstance(source, nn.Module):
        model = unwrap(source)
        return Source(_tensors(model.state_dict()), f"source {type(model).__name__}", module=model)
    if isinstance(source, Mapping):
        return _unwrapped(source, "source state dict")
    if isinstance(source, (str, Path)):
        path = Path(source)
        return _unwrapped(_load(path), f"source {path.name}")
    raise SourceError(f"source must be a path, a state dict or a torch.nn.Module; received {type(source).__name__}.")


def _load(path: Path) -> Mapping[str, Any]:
    if path.is_dir() and (path / "model.safetensors").is_file():
        path = path / "model.safetensors"  # what a run left
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
            f"source {str(path)!r} cannot be read as weights: {type(error).__name__}. It is damaged, of another kind, "
            "or holds more than weights, and nothing in a file is executed here. Save the state dict alone, with "
            "torch.save(model.state_dict(), path) or as safetensors."
        ) from error
    if not isinstance(loaded, Mapping):
        raise SourceError(f"source {str(path)!r} holds a {type(loaded).__name__}; a state dict is needed.")
    return loaded


def _unwrapped(found: Mapping[str, Any], where: str) -> Source:
    notes: list[str] = []
    while True:
        key = next((k for k in _WRAPPERS if isinstance(found.get(k), Mapping)), None)
        if key is None:
            break
        beside = sorted(str(k) for k in found if k != key)
        notes.append(f"took the entry {key!r}" + (f", left {', '.join(beside[:6])}" if beside else ""))
        found = found[key]
    tensors = _tensors(found)
    if stray := sorted(str(k) for k, v in found.items() if not isinstance(v, Tensor)):
        notes.append(f"left entries that are not tensors: {', '.join(stray[:6])}")
    if not tensors:
        raise SourceError(f"{where}: no tensors in it (entries: {_some(map(str, found))}); a state dict is needed.")
    return Source(tensors, where, tuple(notes))


def _tensors(found: Mapping[str, Any]) -> dict[str, Tensor]:
    return {canonical(str(name)): value.detach() for name, value in found.items() if isinstance(value, Tensor)}


def _candidates(names: Iterable[str]) -> list[str]:
    """Prefixes to try, shortest first: none, the known ones that occur, and those behind them."""
    found = [""]
    for prefix in found:
        more = [prefix + known for known in _PREFIXES]
        found += [p for p in more if p.count(".") <= 3 and any(name.startswith(p) for name in names)]
    return sorted(found, key=len)


def _some(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return ", ".join(repr(name) for name in ordered[:4]) + (", …" if len(ordered) > 4 else "")
