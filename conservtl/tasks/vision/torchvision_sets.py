"""Data sets of torchvision by name."""

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
    """Return the training and test parts of a set, or split the whole set by ``split_seed``.

    Raises:
        DataError: the name is unknown, the set is not on this disk, or it does not have one class an image.
        MissingExtraError: torchvision is not installed.
    """
    train, test = _parts_of(data)
    if data.corruption is None:
        return Parts(train, test)
    return Parts(train, test, train.classes, train, test, data.corruption)


class _SetOpener:
    """Function from an image's number to a Pillow image; picklable if the set is."""

    def __init__(self, images: Any, name: str) -> None:
        self.images, self.name = images, name

    def __call__(self, number: int) -> Any:
        try:
            return self.images[number][0]
        except (OSError, SyntaxError) as error:
            raise DataError(f"{self.name}: image {number} cannot be read: {error}. Download the set again.") from error


def _parts_of(data: TorchvisionData) -> tuple[ImagePart, ImagePart]:
    sets = require("torchvision.datasets", "vision")
    if data.name not in sets.__all__:
        raise DataError(
            f"data.name must be a class of torchvision.datasets; received {data.name!r}."
            f"{hint(data.name, sets.__all__, count=3)}"
        )
    kind = getattr(sets, data.name)
    parameters = inspect.signature(kind).parameters
    args: dict[str, Any] = dict(data.args)
    if "root" in parameters:
        args["root"] = data.root
    if "train" in parameters:
        parts = [_open(kind, data, args | {"train": train}) for train in (True, False)]
    elif "split" in parameters:
        parts = [_open(kind, data, args | {"split": part}) for part in (data.train_split, data.test_split)]
    else:
        whole = _part(_open(kind, data, args), data.name, "all")
        return split(whole, data.test_fraction, data.split_seed, f"data.name {data.name}")
    train, test = (_part(images, data.name, part) for images, part in zip(parts, ("train", "test"), strict=True))
    if train.classes != test.classes:
        raise DataError(
            f"data.name must have the same classes in both parts; {data.name} has {train.classes} "
            f"and {test.classes}. Choose another set or other parts."
        )
    return train, test


def _open(kind: Any, data: TorchvisionData, args: dict[str, Any]) -> Any:
    try:
        return kind(**args)
    except (RuntimeError, OSError) as error:
        raise DataError(
            f"data.root must hold torchvision's {data.name}; {data.root} does not: {error}. Nothing is "
            f"downloaded here: download it with torchvision.datasets.{data.name}(..., download=True)."
        ) from error
    except (TypeError, ValueError) as error:
        raise DataError(
            f"data.args, data.train_split and data.test_split must fit torchvision's {data.name}; "
            f"received {args}, which raises: {error}. See its documentation."
        ) from error


def _part(images: Any, name: str, part: str) -> ImagePart:
    labels = _labels(images, name)
    values = sorted(set(labels))
    classes = getattr(images, "classes", None)
    if isinstance(classes, Sequence) and len(classes) > max(values, default=0):
        names = [_text(name) for name in classes]
    else:
        names = [str(value) for value in values]
        labels = [values.index(label) for label in labels]
    return ImagePart(
        tuple(names),
        tuple(labels),
        tuple(f"{part}_{i:06d}" for i in range(len(labels))),
        tuple(range(len(labels))),
        _SetOpener(images, name),
    )


def _labels(images: Any, name: str) -> list[int]:
    """Return the labels, without decoding images if the set has them in a usual attribute."""
    for field in ("targets", "labels", "_labels"):
        stored = getattr(images, field, None)
        if stored is not None and len(stored) == len(images) and all(_is_label(label) for label in stored):
            return [int(label) for label in stored]
    labels = [images[i][1] for i in range(len(images))]
    if not labels or not all(_is_label(label) for label in labels):
        raise DataError(
            f"data.name must be a set of images with one class each; {name} has "
            f"{type(labels[0]).__name__ if labels else 'nothing'} as a label. Choose another set."
        )
    return [int(label) for label in labels]


def _is_label(value: Any) -> bool:
    try:
        return getattr(value, "ndim", 0) == 0 and not isinstance(value, str) and int(value) == value
    except (TypeError, ValueError):
        return False


def _text(name: Any) -> str:
    """Return the name of a class; in ImageNet, it is a tuple of synonyms."""
    return name if isinstance(name, str) else ", ".join(str(synonym) for synonym in name)
