"""Files of a merged checkpoint: shards, index and the first model's configuration."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from torch import Tensor

from conservtl.errors import SpecError
from conservtl.source.read import SourceLike
from conservtl.storage.files import write_text
from conservtl.storage.folders import atomic_folder, check_replaceable
from conservtl.storage.tensor_writer import Entry, write_tensors
from conservtl.weights.checkpoints import Checkpoint

__all__ = ["check_target", "write_merged"]

_COPIED = ("*.json", "*.jinja", "*.model", "*.spm", "*.tiktoken", "vocab*", "merges.txt", "LICENSE*", "*.py")
_LEFT = ("*.index.json", "trainer_state.json", "*_results.json", "adapter_config.json", "report.json")
_KNOWN = (*_COPIED, "*.safetensors")


def check_target(target: Path, inputs: Sequence[SourceLike], *, overwrite: bool) -> None:
    """Raise unless the result can be written: to a new file or folder, which is none of the inputs."""
    paths = [Path(one) for one in inputs if isinstance(one, str | Path)]
    if target.exists() and any(path.exists() and target.samefile(path) for path in paths):
        raise SpecError(f"out must be none of the checkpoints to merge; received {str(target)!r}. Give another name.")
    if target.suffix in (".pt", ".pth", ".bin", ".ckpt"):
        raise SpecError(f"out must be a folder or end in .safetensors; received {str(target)!r}.")
    if target.suffix != ".safetensors":
        check_replaceable(target, _KNOWN, overwrite=overwrite)
    elif target.exists() and not (overwrite and target.is_file()):
        raise SpecError(f"{str(target)!r} exists. Give another name, or ask for it to be overwritten (--overwrite).")


def write_merged(target: Path, first: Checkpoint, mixed: Callable[[str], Tensor], described: str) -> None:
    """Write a merged checkpoint, tensor by tensor.

    A folder gets the first model's shards and further files. ``described`` says how it was merged, for the metadata.
    """
    read: Mapping[str, Entry] = first.entries
    parts: dict[str, dict[str, Entry]] = {}
    for name, entry in read.items():
        parts.setdefault(_file_name(first.files.get(name, "")), {})[name] = entry

    def write(path: Path, entries: Mapping[str, Entry], file: str) -> None:
        kept = next((texts for name, texts in first.metadata.items() if _file_name(name) == file), {})
        write_tensors(path, entries, mixed, {"format": "pt", **kept, "merge": described})

    if target.suffix == ".safetensors":
        write(target, read, next(iter(parts)) if len(parts) == 1 else "")
        return
    with atomic_folder(target) as folder:
        if first.index is None:
            write(folder / "model.safetensors", read, next(iter(parts)))
        else:
            for file, entries in parts.items():
                write(folder / file, entries, file)
            weight_map = {name: file for file, entries in sorted(parts.items()) for name in entries}
            index = {
                "metadata": {"total_size": sum(entry.size for entry in read.values())},
                "weight_map": dict(sorted(weight_map.items())),
            }
            name = re.sub(r"^pytorch_model\.bin", "model.safetensors", first.index)
            write_text(json.dumps(index, indent=2) + "\n", folder / name)
        if first.folder is not None:
            _copy_files(first.folder, folder)


def _file_name(file: str) -> str:
    """Return the name of a file of safetensors for one that may be of torch."""
    stem = re.sub(r"\.(bin|pt|pth|th|ckpt)$", "", file)
    if stem == file:
        return file or "model.safetensors"
    return re.sub(r"^pytorch_model", "model", stem) + ".safetensors"


def _copy_files(source: Path, target: Path) -> None:
    """Copy configuration, tokenizer, licence and code of the model, and the folders of sentence encoders' modules."""
    folders = [path for path in source.iterdir() if path.is_dir() and re.fullmatch(r"\d+_\w+", path.name)]
    for path in [*source.iterdir(), *(inner for folder in folders for inner in folder.iterdir())]:
        wanted = any(fnmatchcase(path.name, glob) for glob in _COPIED)
        if not path.is_file() or not wanted or any(fnmatchcase(path.name, glob) for glob in _LEFT):
            continue
        place = target / path.relative_to(source)
        place.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, place)
