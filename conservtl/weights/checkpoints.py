"""A checkpoint in files, one or many, whose tensors are read one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from conservtl.errors import SourceError
from conservtl.layers import canonical, unwrap
from conservtl.source.entries import tensors_of, weights_in
from conservtl.source.folder import files_by_tensor, weights_at
from conservtl.source.read import SourceLike
from conservtl.source.references import reference_of
from conservtl.source.renaming import check_unique, known_prefixes
from conservtl.source.run_header import read_header
from conservtl.source.weight_files import load_file
from conservtl.storage.tensor_files import check_digest, opened
from conservtl.storage.tensor_writer import CODES, Entry

__all__ = ["Checkpoint", "open_checkpoint"]

_TYPES = {code: dtype for dtype, code in CODES.items()}


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by name, with types and shapes known and values read on demand.

    Args:
        where: name of the checkpoint in messages.
        entries: type and shape of each tensor by name, in the order of the files.
        reads: name -> function that returns the tensor, on the CPU.
        files: name -> name of the file that holds it; empty for tensors in memory.
        memory: name -> what two tensors share that are one in memory, in files of torch.
        folder: folder with the model's further files, if the checkpoint is one.
        index: name of the index, if there is one.
        metadata: texts of each file of safetensors by its name.
        run: header of the run that saved it, or None.
        notes: remarks on the entry that was taken of a file with several.
    """

    where: str
    entries: dict[str, Entry]
    reads: Mapping[str, Callable[[], Tensor]]
    files: Mapping[str, str] = field(default_factory=dict)
    memory: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    index: str | None = None
    metadata: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    run: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()

    def read(self, name: str) -> Tensor:
        """Return a tensor."""
        return self.reads[name]()

    def matched(self, names: Mapping[str, Any]) -> Checkpoint:
        """Return the checkpoint without the prefix (``module.``, ``model.``) that hides most of these names."""
        own = names.keys()
        best = max(known_prefixes(self.entries), key=lambda prefix: len(self._without(prefix).keys() & own))
        return self.renamed(self._without(best))

    def renamed(self, names: Mapping[str, str]) -> Checkpoint:
        """Return the checkpoint under other names: new name -> present name."""
        if all(new == old for new, old in names.items()):
            return self
        return replace(
            self,
            entries={new: self.entries[old] for new, old in names.items()},
            reads={new: self.reads[old] for new, old in names.items()},
            files={new: self.files[old] for new, old in names.items() if old in self.files},
            memory={new: self.memory[old] for new, old in names.items() if old in self.memory},
        )

    def _without(self, prefix: str) -> dict[str, str]:
        new = {name: name.removeprefix(prefix) for name in self.entries}
        check_unique(new, self.where)
        return {short: name for name, short in new.items()}


@contextmanager
def open_checkpoint(source: SourceLike, key: str | None = None) -> Iterator[Checkpoint]:
    """Open a checkpoint; no tensor is in memory before it is read, but those of torch's oldest file format.

    Args:
        source: a path of a file or a folder, a name as ``adapt`` takes it, a state dict or a model.
        key: the entry to take of a file that has it; dots lead to nested entries.

    Raises:
        SourceError: it cannot be read, or a tensor has a type that safetensors cannot hold.
    """
    with ExitStack() as files:
        found = _opened(source, files, key)
        for name, entry in found.entries.items():
            if entry.dtype not in CODES:
                raise SourceError(
                    f"{found.where}: types must be ones that safetensors can hold; {name!r} has {entry.dtype}. Convert "
                    "it, or leave it out of the state dict."
                )
        yield found


def _opened(source: SourceLike, files: ExitStack, key: str | None) -> Checkpoint:
    if (reference := reference_of(source)) is not None:
        pinned = reference.pinned()
        return replace(_opened(pinned.read(), files, key), where=f"source {pinned}")
    if isinstance(source, nn.Module):
        model = unwrap(source)
        return _in_memory(dict(model.state_dict()), f"source {type(model).__name__}")
    if isinstance(source, Mapping):
        return _in_memory(source, "source state dict", key)
    if not isinstance(source, str | Path):
        raise SourceError(
            f"a checkpoint must be a path, a name, a state dict or a model; received {type(source).__name__}."
        )
    path = Path(source)
    where = f"source {path.name or str(path)}"
    chosen = weights_at(path)
    if chosen.suffix == ".json" and chosen.is_file():
        return replace(_shards(chosen, where, files, key), folder=chosen.parent, index=chosen.name)
    return replace(_file(chosen, where, files, key), folder=path if path.is_dir() else None, run=read_header(chosen))


def _file(path: Path, where: str, files: ExitStack, key: str | None) -> Checkpoint:
    if path.suffix != ".safetensors" or not path.is_file():
        found = _in_memory(load_file(path), where, key)
        return replace(found, files=dict.fromkeys(found.entries, path.name))
    check_digest(path)
    file = files.enter_context(opened(path))
    names = {canonical(name): name for name in file.keys()}  # noqa: SIM118 - it is no mapping
    if len(names) < len(file.keys()):
        check_unique({name: canonical(name) for name in file.keys()}, where)  # noqa: SIM118
    entries = {}
    for name, old in names.items():
        described = file.get_slice(old)
        if (code := described.get_dtype()) not in _TYPES:
            raise SourceError(f"{where}: {name!r} has the type {code}, which cannot be mixed. Convert it first.")
        entries[name] = Entry(_TYPES[code], tuple(described.get_shape()))
    return Checkpoint(
        where,
        entries,
        {name: partial(file.get_tensor, old) for name, old in names.items()},
        dict.fromkeys(names, path.name),
        metadata={path.name: file.metadata() or {}},
    )


def _shards(index: Path, where: str, files: ExitStack, key: str | None) -> Checkpoint:
    listed = files_by_tensor(index)
    parts = {}
    for file in dict.fromkeys(listed.values()):
        if not (index.parent / file).is_file():
            raise SourceError(f"{where}: {file} is missing, which {index.name} lists. Put it beside the index.")
        parts[file] = _file(index.parent / file, where, files, key)
    owner = {canonical(name): file for name, file in listed.items()}
    if missing := [name for name, file in owner.items() if name not in parts[file].entries]:
        raise SourceError(
            f"{where}: {owner[missing[0]]} has no tensor {missing[0]!r}, which {index.name} says it holds. Files of "
            "two models may be mixed: save or download the folder again."
        )
    return Checkpoint(
        where,
        {name: parts[file].entries[name] for name, file in owner.items()},
        {name: parts[file].reads[name] for name, file in owner.items()},
        owner,
        {name: (file, parts[file].memory[name]) for name, file in owner.items() if name in parts[file].memory},
        metadata={file: part.metadata.get(file, {}) for file, part in parts.items()},
    )


def _in_memory(entries: Mapping[str, Any], where: str, key: str | None = None) -> Checkpoint:
    """Return a state dict, whose tensors may be mapped from a file, as a checkpoint."""
    has_key = key is not None and (key in entries or key.partition(".")[0] in entries)
    weights, notes = weights_in(entries, where, key if has_key else None)
    tensors = tensors_of(weights, where, [])
    return Checkpoint(
        where,
        {name: Entry(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()},
        {name: partial(_on_cpu, tensor) for name, tensor in tensors.items()},
        memory={name: _place(tensor) for name, tensor in tensors.items() if tensor.numel()},
        notes=tuple(notes),
    )


def _on_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu()


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Return what two tensors have in common that are one in memory."""
    return (str(tensor.device), tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
