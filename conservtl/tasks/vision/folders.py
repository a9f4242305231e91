"""Image data in folders, one for each class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unicodedata import normalize

from conservtl.errors import DataError, counted
from conservtl.tasks.bad_files import bad_among, explained, names_below, shown_name, skipped_text
from conservtl.tasks.file_listing import FolderWalk
from conservtl.tasks.vision.datasets import ImageFolderData
from conservtl.tasks.vision.image_settings import ImageSettings
from conservtl.tasks.vision.parts import ImagePart, Parts, split
from conservtl.tasks.vision.preprocessing import VisionPreprocessing, open_image

__all__ = ["class_names", "folder_parts"]

_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
_TRAINS = ("train", "training")
_TESTS = ("test", "testing", "val", "valid", "validation")
_LAYOUTS = "Use one folder for each class, or train/ and test/ (or val/) with one folder for each class"


def folder_parts(data: ImageFolderData, preprocessing: VisionPreprocessing | None = None) -> Parts:
    """Return the images of the target's folder and of the source's, if there is one.

    Every image is read, and must be such as the preprocessing can convert; bad ones are refused, or left out with
    ``on_bad: skip``.

    Raises:
        DataError: a folder is missing, empty or has another structure, source and target overlap, or a file is bad.
    """
    converts = preprocessing or VisionPreprocessing(images=data.images or ImageSettings())
    train, test, skipped = _parts_of(data.root, "data.root", data, converts)
    if data.source_root is not None:
        _check_apart(data.root, data.source_root)
        source_train, source_test, more = _parts_of(data.source_root, "data.source_root", data, converts)
        skipped |= {f"{data.source_root.name}/{name}": reason for name, reason in more.items()}
    elif data.corruption is not None:
        source_train, source_test = train, test
    else:
        return Parts(train, test, skipped=skipped)
    return Parts(train, test, source_train.classes, source_train, source_test, data.corruption, skipped)


def class_names(root: Path, data: ImageFolderData) -> tuple[str, ...]:
    """Return the names of the classes in a folder, in order, from the names of its folders alone."""
    walk = _walk(root, data)
    folders = _folders(root, walk)
    trains = _named(folders, _TRAINS)
    return tuple(_folders(folders[trains[0]], walk) if trains else folders)


def _opened(files: Sequence[Path], number: int) -> Any:
    """Return an image by its number, as a Pillow image."""
    return open_image(files[number])


def _parts_of(
    root: Path, field: str, data: ImageFolderData, preprocessing: VisionPreprocessing
) -> tuple[ImagePart, ImagePart, dict[str, str]]:
    """Return the training and the test part of a folder, and the names of skipped files -> why."""
    if not root.is_dir():
        kind = "a file" if root.exists() else "nothing"
        raise DataError(f"{field} must be a folder of images; {root} is {kind}. Correct the path.")
    walk = _walk(root, data)
    folders = _folders(root, walk)
    trains, tests = _named(folders, _TRAINS), _named(folders, _TESTS)
    if len(trains) > 1:
        raise DataError(f"{field} must have one training part; {root} has {' and '.join(trains)}. Remove one.")
    if bool(trains) != bool(tests):
        raise DataError(
            f"{field} must have a training and a test part; {root} has only {', '.join(folders)}. {_LAYOUTS}."
        )
    belows = [trains[0], tests[0]] if trains else [""]
    trees = [_files_by_class(folders[below] if below else root, walk, field) for below in belows]
    walk.finish()
    files = [file for tree in trees for images in tree.values() for file in images]
    bad = bad_among(data, walk.bad, files, preprocessing.check, f"vision {preprocessing.model_dump_json()}")
    skipped = names_below(root, bad)
    with explained(skipped):
        parts = [_part(root, tree, bad, field) for tree in trees]
        if len(parts) == 1:
            return *split(parts[0], data.test_fraction, data.split_seed, field), skipped
        train, test = parts
        if train.classes != test.classes:
            unmatched = ", ".join(sorted(set(train.classes) ^ set(test.classes)))
            raise DataError(
                f"{field} must have the same classes in {trains[0]}/ and {tests[0]}/; {root} has these in one of the "
                f"two only: {unmatched}. Add or remove these folders."
            )
    return train, test, skipped


def _walk(root: Path, data: ImageFolderData) -> FolderWalk:
    return FolderWalk(root, is_wanted=_is_image, is_hidden=_is_hidden, follow_links=data.follow_links)


def _named(folders: Mapping[str, Path], names: Sequence[str]) -> list[str]:
    """Return the folders with these names in any case, in the order of the names."""
    return [folder.name for name in names for folder in folders.values() if folder.name.casefold() == name]


def _files_by_class(folder: Path, walk: FolderWalk, field: str) -> dict[Path, list[Path]]:
    """Return the folder of each class, in the order of their names -> its images; after ``walk.finish``."""
    classes = _folders(folder, walk)
    if len(classes) < 2:
        loose = sum(_is_image(file.name) for file in folder.iterdir())
        content = f"{counted(len(classes), 'folder')} and {counted(loose, 'loose image')}"
        if walk.bad:
            content += f" ({counted(len(walk.bad), 'bad entry')} apart: {skipped_text(names_below(folder, walk.bad))})"
        raise DataError(f"{field} must have at least 2 classes; {folder} has {content}. {_LAYOUTS}.")
    found: dict[Path, list[Path]] = {}
    for place in classes.values():
        walk.add_files(place, found.setdefault(place, []))
    return found


def _part(root: Path, tree: Mapping[Path, Sequence[Path]], bad: Mapping[Path, str], field: str) -> ImagePart:
    files: list[Path] = []
    labels: list[int] = []
    classes = [place for place in tree if place not in bad]
    for position, place in enumerate(classes):
        images = [file for file in tree[place] if file not in bad]
        images.sort(key=lambda file: (str(file.parent), file.name))  # the order of torchvision's ImageFolder
        if not images:
            raise DataError(
                f"{field}: every class must have images; {shown_name(place)} has none (looked for "
                f"{', '.join(_EXTENSIONS)}). Add images, or remove the folder."
            )
        files += images
        labels += [position] * len(images)
    names = tuple(file.relative_to(root).as_posix() for file in files)
    named = tuple(normalize("NFC", place.name) for place in classes)
    return ImagePart(named, tuple(labels), names, tuple(range(len(files))), partial(_opened, tuple(files)))


def _folders(folder: Path, walk: FolderWalk) -> dict[str, Path]:
    """Return the visible folders in a folder by their names in NFC, in order."""
    paths = walk.folders(folder)
    named = {normalize("NFC", path.name): path for path in paths}
    if len(named) < len(paths):
        twice = sorted(str(path) for path in paths if path not in named.values())
        raise DataError(f"{twice[0]} must differ from another folder by more than Unicode's composition. Rename it.")
    return dict(sorted(named.items()))


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
