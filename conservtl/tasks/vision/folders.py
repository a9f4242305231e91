"""Image data in folders, one for each class."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unicodedata import normalize

from conservtl.errors import DataError
from conservtl.tasks.vision.datasets import ImageFolderData
from conservtl.tasks.vision.parts import ImagePart, Parts, split
from conservtl.tasks.vision.preprocessing import open_image

__all__ = ["folder_parts"]

_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
_TRAINS = ("train", "training")
_TESTS = ("test", "testing", "val", "valid", "validation")
_LAYOUTS = "Use one folder for each class, or train/ and test/ (or val/) with one folder for each class"


def folder_parts(data: ImageFolderData) -> Parts:
    """Return the images of the target's folder and of the source's, if there is one.

    Raises:
        DataError: a folder is missing, empty or has another structure, or source and target overlap.
    """
    train, test = _parts_of(data.root, "data.root", data)
    if data.source_root is not None:
        _check_apart(data.root, data.source_root)
        source_train, source_test = _parts_of(data.source_root, "data.source_root", data)
    elif data.corruption is not None:
        source_train, source_test = train, test
    else:
        return Parts(train, test)
    return Parts(train, test, source_train.classes, source_train, source_test, data.corruption)


class _FileOpener:
    """Function from an image's number to a Pillow image; picklable, for loaders with workers."""

    def __init__(self, files: tuple[Path, ...]) -> None:
        self.files = files

    def __call__(self, number: int) -> Any:
        return open_image(self.files[number])


def _parts_of(root: Path, field: str, data: ImageFolderData) -> tuple[ImagePart, ImagePart]:
    if not root.is_dir():
        kind = "a file" if root.exists() else "nothing"
        raise DataError(f"{field} must be a folder of images; {root} is {kind}. Correct the path.")
    folders = _folders(root)
    trains, tests = _named(folders, _TRAINS), _named(folders, _TESTS)
    if len(trains) == 1 and tests:
        train, test = _tree(root, trains[0], field), _tree(root, tests[0], field)
        if train.classes != test.classes:
            unmatched = ", ".join(sorted(set(train.classes) ^ set(test.classes)))
            raise DataError(
                f"{field} must have the same classes in {trains[0]}/ and {tests[0]}/; {root} has these in one of the "
                f"two only: {unmatched}. Add or remove these folders."
            )
        return train, test
    if len(trains) > 1:
        raise DataError(f"{field} must have one training part; {root} has {' and '.join(trains)}. Remove one.")
    if trains or tests:
        raise DataError(
            f"{field} must have a training and a test part; {root} has only {', '.join(folders)}. {_LAYOUTS}."
        )
    return split(_tree(root, "", field), data.test_fraction, data.split_seed, field)


def _named(folders: Mapping[str, Path], names: Sequence[str]) -> list[str]:
    """Return the folders with these names in any case, in the order of the names."""
    return [folder.name for name in names for folder in folders.values() if folder.name.casefold() == name]


def _tree(root: Path, below: str, field: str) -> ImagePart:
    folder = root / below
    classes = _folders(folder)
    if len(classes) < 2:
        loose = sum(_is_image(file.name) for file in folder.iterdir())
        content = f"{len(classes)} folder{'' if len(classes) == 1 else 's'} and {loose} loose images"
        raise DataError(f"{field} must have at least 2 classes; {folder} has {content}. {_LAYOUTS}.")
    files: list[Path] = []
    labels: list[int] = []
    for position, place in enumerate(classes.values()):
        images = _images(place)
        if not images:
            raise DataError(
                f"{field}: every class must have images; {place} has none (looked for "
                f"{', '.join(_EXTENSIONS)}). Add images, or remove the folder."
            )
        files += images
        labels += [position] * len(images)
    names = tuple(file.relative_to(root).as_posix() for file in files)
    return ImagePart(tuple(classes), tuple(labels), names, tuple(range(len(files))), _FileOpener(tuple(files)))


def _folders(folder: Path) -> dict[str, Path]:
    """Return the visible folders in a folder by their names in NFC, in order."""
    paths = [path for path in folder.iterdir() if path.is_dir() and not _is_hidden(path.name)]
    named = {normalize("NFC", path.name): path for path in paths}
    if len(named) < len(paths):
        twice = sorted(str(path) for path in paths if path not in named.values())
        raise DataError(f"{twice[0]} must differ from another folder by more than Unicode's composition. Rename it.")
    return dict(sorted(named.items()))


def _images(folder: Path) -> list[Path]:
    """Return all images in a folder and its visible subfolders, in the order of torchvision's ImageFolder."""
    walked = []
    for where, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not _is_hidden(name)]
        walked.append((where, names))
    return [Path(where) / name for where, names in sorted(walked) for name in sorted(names) if _is_image(name)]


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "__"))


def _is_image(name: str) -> bool:
    return name.lower().endswith(_EXTENSIONS) and not name.startswith(".")


def _check_apart(target: Path, source: Path) -> None:
    first, second = target.resolve(), source.resolve()
    if first == second or first in second.parents or second in first.parents:
        raise DataError(
            f"data.source_root must not overlap with data.root, or the source would be tested on images of "
            f"the target; received {source} and {target}. Use two folders, neither inside the other."
        )
