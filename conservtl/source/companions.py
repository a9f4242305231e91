"""Files beside weights: the tokenizer and the settings that save_pretrained writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from conservtl.source.folder import SINGLE
from conservtl.source.references import reference_of
from conservtl.source.references.hugging_face import HuggingFace

__all__ = ["companions"]


def companions(weights: str | Path, names: Sequence[str]) -> dict[str, Path]:
    """Return those of the named files that are beside weights: name -> path, downloaded if need be.

    Args:
        weights: a folder, its ``model.safetensors`` or ``pytorch_model.bin``, or ``hf:ORG/NAME@REVISION``; others have
            no files beside them.
        names: of the files.
    """
    if isinstance(weights, str) and isinstance(reference := reference_of(weights), HuggingFace):
        return reference.repository.present(names)
    path = Path(weights)
    folder = path.parent if path.name in (SINGLE, "pytorch_model.bin") else path
    return {name: folder / name for name in names if (folder / name).is_file()} if folder.is_dir() else {}
