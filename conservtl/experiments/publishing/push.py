"""Upload of a saved model and its card to the Hugging Face Hub."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from conservtl.errors import SourceError, SpecError
from conservtl.experiments.publishing.card import CARD
from conservtl.extras import require
from conservtl.source.downloads import one_line
from conservtl.source.run_header import WEIGHTS
from conservtl.storage.tensor_files import check_digest, read_header

__all__ = ["Upload", "push"]

_PUBLISHED = (CARD, WEIGHTS, "config.json")  # reports and specs name folders and files of the data
_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Upload:
    """Report of an upload.

    Args:
        repository: ``ORG/NAME``.
        files: name -> bytes.
        address: of the repository; None: nothing was sent.
    """

    repository: str
    files: Mapping[str, int]
    address: str | None = None

    def __str__(self) -> str:
        listed = [f"{size:>14,}  {name}" for name, size in self.files.items()]
        end = f"would go to {self.repository}" if self.address is None else self.address
        return "\n".join([*listed, end])


def push(folder: str | Path, repository: str, *, public: bool = False, dry_run: bool = False) -> Upload:
    """Upload weights, configuration and card of a folder; reports, specs, histories and checkpoints stay here.

    A missing repository ``ORG/NAME`` is made, which its owner alone sees unless ``public``. With ``dry_run`` nothing is
    sent.

    Raises:
        SpecError: the name is wrong, a file is missing, or one names a folder of this machine.
        SourceError: the weights are damaged, or the Hub cannot be reached or refuses.
        MissingExtraError: huggingface_hub is not installed.
    """
    place = Path(folder)
    if not _NAME.fullmatch(repository):
        raise SpecError(f"a repository must have the form ORG/NAME; received {repository!r}.")
    if missing := [name for name in (WEIGHTS, CARD) if not (place / name).is_file()]:
        raise SpecError(f"{str(place)!r} must hold {missing[0]}, as a run or ctl.save writes it. Give such a folder.")
    names = [name for name in _PUBLISHED if (place / name).is_file()]
    if linked := [name for name in names if (place / name).is_symlink()]:
        raise SpecError(f"{linked[0]!r} must be a file; it is a link to another place. Copy the file there.")
    check_digest(place / WEIGHTS)
    for where, text in _texts(read_header(place / WEIGHTS) or {}, "header"):
        if PurePosixPath(text).is_absolute() or PureWindowsPath(text).is_absolute():
            raise SpecError(
                f"{WEIGHTS}: its {where} must name no folder of this machine; it holds {text!r}. Save the model again "
                "without it."
            )
    upload = Upload(repository, {name: (place / name).stat().st_size for name in names})
    hub = require("huggingface_hub", "hub")
    if dry_run:
        return upload
    try:
        api = hub.HfApi()
        address = api.create_repo(repository, private=not public, exist_ok=True)
        api.upload_folder(
            repo_id=repository, folder_path=place, allow_patterns=names, commit_message="Adapted by conservtl"
        )
    except Exception as error:  # of the network's library, which the version decides
        raise SourceError(
            f"{repository} cannot be written to ({one_line(error)}). Check the network and the name, or hf auth login."
        ) from error
    return Upload(repository, upload.files, str(address))


def _texts(value: Any, where: str) -> Iterator[tuple[str, str]]:
    """Yield the dotted name and the content of each text in JSON; labels are the user's own words."""
    if isinstance(value, str):
        yield where, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            if (where, key) != ("header", "labels"):
                yield from _texts(inner, f"{where}.{key}")
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner, where)
