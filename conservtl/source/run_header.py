"""The header of a run's saved model: labels, preprocessing, model section and what was added to the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Required

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict

from conservtl.errors import SourceError
from conservtl.storage import tensor_files

__all__ = ["OWN", "WEIGHTS", "read_header", "weights_file"]

OWN = "python"
"""Task in the header of a model that was saved from Python: its network is known to its user alone."""

WEIGHTS = "model.safetensors"
"""Name of the saved model in a run's folder."""


def weights_file(path: Path) -> Path:
    """Return the saved model in a run's folder; any other path as it is."""
    return path / WEIGHTS if path.is_dir() and (path / WEIGHTS).is_file() else path


def read_header(path: Path) -> dict[str, Any] | None:
    """Return what a run wrote beside the weights; None for a file that no run wrote or that cannot be read.

    Raises:
        SourceError: the header is none that a run writes.
    """
    path = weights_file(path)
    if path.suffix != ".safetensors" or not path.is_file():
        return None
    try:
        header = tensor_files.read_header(path)
    except SourceError:
        return None
    if header is None:
        return None
    try:
        _HEADER.validate_python(header)
        return _upgraded(header)
    except (ValidationError, TypeError, ValueError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": ("instance_statistics",)}
        raise SourceError(
            f"{str(path)!r}: its header must be as a run writes it; {'.'.join(map(str, first['loc']))} is not. The "
            "file is damaged, or another program wrote it."
        ) from error


class _Extended(TypedDict, total=False):
    strategies: list[dict[str, Any]]
    extensions: list[dict[str, Any]]
    example: Any
    layers: list[str] | None
    head: list[str] | None
    modules: list[str]


class _Header(TypedDict, total=False):
    task: Required[str]
    labels: Required[list[str]]
    model: Required[dict[str, Any]]
    preprocessing: Required[dict[str, Any]]
    module: str
    metadata: dict[str, Any]
    extended: _Extended
    instance_statistics: dict[str, float]


_HEADER = TypeAdapter(_Header)


def _upgraded(header: dict[str, Any]) -> dict[str, Any]:
    """Return a header as this version writes it: an earlier one named each norm that mixes and its share."""
    shares = header.pop("instance_statistics", {})
    if shares:
        names = {share: [name for name, other in shares.items() if other == share] for share in shares.values()}
        extended = header.setdefault("extended", {"strategies": [], "example": None, "layers": None})
        extended["extensions"] = [
            {"kind": "instance_statistics", "by": "NormAdaptation", "share": share, "names": names[share]}
            for share in names
        ]
    return header
