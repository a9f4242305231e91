"""torchvision's data sets by name."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from conservtl.errors import DataError, hint
from conservtl.extras import require
from conservtl.tasks.vision.datasets import TorchvisionData
from conservtl.tasks.vision.parts import ImagePart, Parts, split

__all__ = ["torchvision_parts"]


def torchvision_parts(data: TorchvisionData) -> Parts:
    """The set's own training and test parts, or one piece split by ``split_seed``.

    Raises:
        DataError: no such set (the nearest are listed), not on this disk, or not one of classified images.
        MissingExtraError: torchvision is not installed.
    """
    train, test = _parts_of(data)
    if data.corruption is None:
        return Parts(train, test)
    return Parts(train, test, train.classes, train, test, data.corruption)


class _Opener:
    """From an image's number to an image of Pillow; as picklable as the set is."""

    def __init__(self, images: Any, name: str) -> None:
        self.images, self.name = images, name

    def __call__(self, number: int) -> Any:
        try:
            return self.images[number][0]
        except (OSError, SyntaxError) as error:
            raise DataError(f"{self.name}: image {number} cannot be read: {error}. Fetch the set again.") from error


def _parts_of(data: TorchvisionData) -> tuple[ImagePart, ImagePart]:
    sets = require("torchvision.datasets", "vision")
    if data.name not in sets.__all__:
        raise DataError(
            f"data.name must be a class of torchvision.datasets; got {data.name!r}."
            f"{hint(data.name, sets.__all__, count=3)}"
        )
    make = getattr(sets, data.name)
    takes = inspect.signature(make).parameters
    given: dict[str, Any] = dict(data.args)
    if "root" in takes:
        given["root"] = data.root
    if "train" in takes:
        parts = [_open(make, data, given | {"train": train}) for train in (True, False)]
    elif "split" in takes:
        parts = [_open(make, data, given | {"split": part}) for part in (data.train_split, data.test_split)]
    else:
        whole = _part(_open(make, data, given), data.name, "all")
        return split(whole, data.test_fraction, data.split_seed, f"data.name {data.name}")
    train, test = (_part(one, data.name, part) for one, part in zip(parts, ("train", "test"), strict=True))
    if train.classes != test.classes:
        raise DataError(
            f"data.name must have the same classes in both of its parts; {data.name} has {train.classes} "
            f"and {test.classes}. Choose another set or other parts."
        )
    return train, test


def _open(make: Any, data: TorchvisionData, given: dict[str, Any]) -> Any:
    try:
        return make(**given)
    except (RuntimeError, OSError) as error:
        raise DataError(
            f"data.root must hold torchvision's {data.name}; {data.root} does not: {error}. Nothing is "
            f"downloaded here: fetch it with torchvision.datasets.{data.name}(..., download=True)."
        ) from error
    except (TypeError, ValueError) as error:
        raise DataError(
            f"data.args, data.train_split and data.test_split must fit torchvision's {data.name}; "
            f"got {given}, and it fails with: {error}. See its documentation."
        ) from error


def _part(images: Any, name: str, part: str) -> ImagePart:
    labels = _labels(images, name)
    values = sorted(set(labels))
    classes = getattr(images, "classes", None)
    if isinstance(classes, Sequence) and len(classes) > max(values, default=0):
        names = [_text(one) for one in classes]
    else:
        names = [str(value) for value in values]
        labels = [values.index(label) for label in labels]
    return ImagePart(
        tuple(names),
        tuple(labels),
        tuple(f"{part}_{i:06d}" for i in range(len(labels))),
        tuple(range(len(labels))),
        _Opener(images, name),
    )


def _labels(images: Any, name: str) -> list[int]:
    """The labels, without decoding images where the set keeps them in one of its usual fields."""
    for field in ("targets", "labels", "_labels"):
        kept = getattr(images, field, None)
        if kept is not None and len(kept) == len(images) and all(_is_label(one) for one in kept):
            return [int(one) for one in kept]
    found = [images[i][1] for i in range(len(images))]
    if not found or not all(_is_label(one) for one in found):
        raise DataError(
            f"data.name must be a set of images with one class each; {name} gives "
            f"{type(found[0]).__name__ if found else 'nothing'} as a label. Choose another set."
        )
    return [int(one) for one in found]


def _is_label(value: Any) -> bool:
    try:
        return getattr(value, "ndim", 0) == 0 and not isinstance(value, str) and int(value) == value
    except (TypeError, ValueError):
        return False


def _text(name: Any) -> str:
    """ImageNet's names are tuples of synonyms."""
    return name if isinstance(name, str) else ", ".join(str(one) for one in name)
