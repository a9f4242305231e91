"""Folders of images, one folder a class."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from conservtl.errors import DataError
from conservtl.tasks.vision.datasets import ImageFolderData
from conservtl.tasks.vision.parts import ImagePart, Parts, split
from conservtl.tasks.vision.preprocessing import open_image

__all__ = ["folder_parts"]

_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
_TESTS = ("test", "val", "valid", "validation")
_LAYOUTS = "It needs a folder a class, or train/ and test/ (or val/) with a folder a class in each"


def folder_parts(data: ImageFolderData) -> Parts:
    """The target's folder and, where there is one, the source's.

    Raises:
        DataError: a folder is missing, empty or laid out otherwise, or source and target overlap.
    """
    train, test = _parts_of(data.root, "data.root", data)
    if data.source_root is not None:
        _refuse_overlap(data.root, data.source_root)
        source_train, source_test = _parts_of(data.source_root, "data.source_root", data)
    elif data.corruption is not None:
        source_train, source_test = train, test
    else:
        return Parts(train, test)
    return Parts(train, test, source_train.classes, source_train, source_test, data.corruption)


class _Opener:
    """From an image's number to an image of Pillow; picklable, for loaders with workers."""

    def __init__(self, files: tuple[Path, ...]) -> None:
        self.files = files

    def __call__(self, number: int) -> Any:
        return open_image(self.files[number])


def _parts_of(root: Path, field: str, data: ImageFolderData) -> tuple[ImagePart, ImagePart]:
    if not root.is_dir():
        kind = "a file" if root.exists() else "nothing"
        raise DataError(f"{field} must be a folder of images; {root} is {kind}. Correct the path.")
    folders = _folders(root)
    tests = [name for name in _TESTS if name in folders]
    if "train" in folders and tests:
        train, test = _tree(root, "train", field), _tree(root, tests[0], field)
        if train.classes != test.classes:
            unmatched = ", ".join(sorted(set(train.classes) ^ set(test.classes)))
            raise DataError(
                f"{field} must have the same classes in train/ and {tests[0]}/; {root} has only one of the "
                f"two for: {unmatched}. Add or remove these folders."
            )
        return train, test
    if "train" in folders or tests:
        raise DataError(
            f"{field} must have a training and a test part; {root} has only {', '.join(folders)}. {_LAYOUTS}."
        )
    return split(_tree(root, "", field), data.test_fraction, data.split_seed, field)


def _tree(root: Path, below: str, field: str) -> ImagePart:
    folder = root / below
    classes = _folders(folder)
    if len(classes) < 2:
        loose = sum(_is_image(file.name) for file in folder.iterdir())
        found = f"{len(classes)} folder{'' if len(classes) == 1 else 's'} and {loose} loose images"
        raise DataError(f"{field} must hold at least 2 classes; {folder} holds {found}. {_LAYOUTS}.")
    files: list[Path] = []
    labels: list[int] = []
    for position, name in enumerate(classes):
        own = _images(folder / name)
        if not own:
            raise DataError(
                f"{field}: every class must have images; {folder / name} has none (looked for "
                f"{', '.join(_EXTENSIONS)}). Add images, or remove the folder."
            )
        files += own
        labels += [position] * len(own)
    names = tuple(file.relative_to(root).as_posix() for file in files)
    return ImagePart(classes, tuple(labels), names, tuple(range(len(files))), _Opener(tuple(files)))


def _folders(folder: Path) -> tuple[str, ...]:
    names = (one.name for one in folder.iterdir() if one.is_dir() and not one.name.startswith((".", "__")))
    return tuple(sorted(names))


def _images(folder: Path) -> list[Path]:
    """Every image below, in ImageFolder's order."""
    walked = sorted(os.walk(folder, followlinks=True))
    return [Path(where) / name for where, _, names in walked for name in sorted(names) if _is_image(name)]


def _is_image(name: str) -> bool:
    return name.lower().endswith(_EXTENSIONS) and not name.startswith(".")


def _refuse_overlap(target: Path, source: Path) -> None:
    one, other = target.resolve(), source.resolve()
    if one == other or one in other.parents or other in one.parents:
        raise DataError(
            f"data.source_root must lie apart from data.root, or the source would be tested on images of "
            f"the target; got {source} and {target}. Name two folders, neither inside the other."
        )
