"""A folder of weights as ``save_pretrained`` writes it: one file, or shards with an index."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from conservtl.errors import SourceError

__all__ = ["INDEX", "SINGLE", "files_by_tensor", "read_shards", "shards", "weights_at"]

SINGLE = "model.safetensors"
"""Name of the weights in one file."""
INDEX = "model.safetensors.index.json"
"""Name of the index of weights in several files."""

_PREFERRED = (SINGLE, INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")
_OTHERS = ("*.safetensors", "*.safetensors.index.json")  # of other libraries, if there is only one
_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d+)-of-(?P<total>\d+)\.(?P<ending>safetensors|bin)")
_ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")


def shards(index: Path) -> list[str]:
    """Return the names of the files that an index lists."""
    return list(dict.fromkeys(files_by_tensor(index).values()))


def weights_at(path: Path) -> Path:
    """Return the file of weights that a path means, or the index of several; a path of neither as it is.

    Of a folder this is the first of ``model.safetensors``, its index, ``pytorch_model.bin`` and its index, or else the
    only file of safetensors or index of such files.

    Raises:
        SourceError: a folder holds no weights, an adapter alone or several files without an index; or the file is one
            of several that hold a model's weights together.
    """
    chosen = _weights_in_folder(path) if path.is_dir() else path
    part = _PART.fullmatch(chosen.name)
    if part is not None and int(part["total"]) > 1 and chosen.is_file():
        index = chosen.with_name(f"{part['stem']}.{part['ending']}.index.json")
        give = f"Give the folder {str(chosen.parent)!r}"
        if not index.is_file():
            give = f"Put all files and their index {index.name} into one folder, and give that"
        raise SourceError(
            f"source {str(chosen)!r} must hold all of a model's weights; it is file {int(part['number'])} of "
            f"{int(part['total'])}, and what the others hold would be missing. {give}; or pass the tensors of this "
            "file alone as a dictionary."
        )
    return chosen


def _weights_in_folder(folder: Path) -> Path:
    for name in _PREFERRED:
        if (folder / name).is_file():
            return folder / name
    if adapter := [name for name in _ADAPTERS if (folder / name).is_file()]:
        raise SourceError(
            f"source {str(folder)!r} must hold a model's weights; it holds an adapter ({adapter[0]}). Merge it into "
            "its base model (merge_and_unload), and save that."
        )
    found = [path for glob in _OTHERS for path in sorted(folder.glob(glob))]
    indices = [path for path in found if path.suffix == ".json"]
    if len(indices or found) == 1:
        return (indices or found)[0]
    names = ", ".join([path.name for path in found] or sorted(path.name for path in folder.iterdir())[:6]) or "nothing"
    raise SourceError(
        f"source {str(folder)!r} is not a file, and a folder must hold {SINGLE} or {INDEX}, as save_pretrained writes "
        f"them; it holds {names}. Give the path of a file, or the folder that has the weights."
    )


def read_shards(index: Path, read: Callable[[Path], Mapping[str, Any]]) -> dict[str, Tensor]:
    """Return the tensors that an index lists, each from its file.

    Files are mapped into memory, so that tensors are read as they are copied.

    Raises:
        SourceError: the index cannot be read; a file of it is missing or lacks a tensor.
    """
    files = files_by_tensor(index)
    tensors: dict[str, Tensor] = {}
    for file in shards(index):
        path = index.parent / file
        if not path.is_file():
            raise SourceError(f"source {str(path)!r} is missing, which {index.name} lists. Put it beside the index.")
        shard = read(path)
        wanted = [name for name, other in files.items() if other == file]
        if missing := [name for name in wanted if name not in shard]:
            raise SourceError(
                f"source {str(path)!r} has no tensor {missing[0]!r}, which {index.name} says it holds. Files of two "
                "models may be mixed: save or download the folder again."
            )
        tensors.update((name, shard[name]) for name in wanted)
    return tensors


def files_by_tensor(index: Path) -> dict[str, str]:
    """Return tensor -> file name, as an index lists them."""
    try:
        files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = {Path(file).name for file in files.values()} - set(files.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(
            f"source {str(index)!r} must hold a weight_map, tensor -> file name; it cannot be read as that "
            f"({type(error).__name__}). Save or download the folder again."
        ) from error
    if names or not files:
        raise SourceError(
            f"source {str(index)!r} must list files beside it; received {sorted(files.values())[:1]}. Save or download "
            "the folder again."
        )
    return files  # type: ignore[no-any-return]
