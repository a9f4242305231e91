"""Data sets of torchvision by name."""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from conservtl.errors import DataError, hint
from conservtl.extras import require
from conservtl.tasks.bad_files import explained, fault_of
from conservtl.tasks.vision.datasets import TorchvisionData
from conservtl.tasks.vision.image_settings import ImageSettings
from conservtl.tasks.vision.parts import ImagePart, Parts, split
from conservtl.tasks.vision.preprocessing import VisionPreprocessing

__all__ = ["torchvision_parts"]

_sound: set[tuple[str, str]] = set()  # parts of sets in which this process found no bad image

_one_at_a_time = threading.Lock()  # what a block changes of Pillow and of warnings holds for all threads


def torchvision_parts(data: TorchvisionData, preprocessing: VisionPreprocessing | None = None) -> Parts:
    """Return the training and test parts of a set, or split the whole set by ``split_seed``.

    Every image is read, and must be such as the preprocessing can convert; bad ones are refused, or left out with
    ``on_bad: skip``.

    Raises:
        DataError: the name is unknown, the set is not on this disk, it does not have one class an image, or an image
            is bad.
        MissingExtraError: torchvision is not installed.
    """
    skipped: dict[str, str] = {}
    converts = preprocessing or VisionPreprocessing(images=data.images or ImageSettings())
    with explained(skipped):
        train, test = _parts_of(data, converts, skipped)
    if data.corruption is None:
        return Parts(train, test, skipped=skipped)
    return Parts(train, test, train.classes, train, test, data.corruption, skipped)


class _SetOpener:
    """Function from an image's number to a Pillow image; picklable if the set is."""

    def __init__(self, images: Any, name: str) -> None:
        self.images, self.name = images, name

    def __call__(self, number: int) -> Any:
        return self.pair(number)[0]

    def pair(self, number: int) -> Any:
        """Return an image and its label, as the set does, but within Pillow's first limit and without Ghostscript."""
        postscript = require("PIL.EpsImagePlugin", "vision")
        bomb = require("PIL.Image", "vision").DecompressionBombWarning
        with _one_at_a_time, warnings.catch_warnings(action="error", category=bomb):
            ghostscript, postscript.gs_binary = postscript.gs_binary, False
            try:
                return self.images[number]
            except Exception as error:  # decoders raise whatever a damaged file makes them
                raise DataError(
                    f"{self.name}: image {number} cannot be read: {str(error) or type(error).__name__}. Download the "
                    "set again, or leave bad images out with data.on_bad: skip."
                ) from error
            finally:
                postscript.gs_binary = ghostscript


def _faults(
    data: TorchvisionData, converts: VisionPreprocessing, opener: _SetOpener, names: Sequence[str], part: str
) -> dict[int, str]:
    """Return the numbers of bad images, if the spec skips them, -> why; sets of decoded pixels are not searched."""
    fields = {"name", "root", "args", "train_split", "test_split"}
    key = (data.model_dump_json(include=fields) + converts.model_dump_json(), part)
    if key in _sound or isinstance(getattr(opener.images, "data", None), (np.ndarray, Tensor)):
        return {}

    def check(number: int) -> None:
        converts.pixels(opener(number), names[number])

    found = {}
    for number in range(len(names)):
        if data.on_bad != "skip":
            check(number)
        elif (fault := fault_of(number, check)) is not None:
            found[number] = fault
    if not found:
        _sound.add(key)
    return found


def _parts_of(
    data: TorchvisionData, converts: VisionPreprocessing, skipped: dict[str, str]
) -> tuple[ImagePart, ImagePart]:
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
        whole = _part(_open(kind, data, args), data, "all", converts, skipped)
        return split(whole, data.test_fraction, data.split_seed, f"data.name {data.name}")
    names = ("train", "test")
    train, test = (_part(images, data, part, converts, skipped) for images, part in zip(parts, names, strict=True))
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


def _part(
    images: Any, data: TorchvisionData, part: str, converts: VisionPreprocessing, skipped: dict[str, str]
) -> ImagePart:
    """Return a part of a set; add to ``skipped`` the images that it leaves out because they are bad."""
    opener = _SetOpener(images, data.name)
    names = [f"{part}_{number:06d}" for number in range(len(images))]
    faults = _faults(data, converts, opener, names, part)
    skipped |= {names[number]: fault for number, fault in faults.items()}
    good = [number for number in range(len(images)) if number not in faults]
    labels = _labels(opener, good)
    values = sorted(set(labels))
    classes = getattr(images, "classes", None)
    if isinstance(classes, Sequence) and len(classes) > max(values, default=0):
        labelled = [_text(name) for name in classes]
    else:
        labelled = [str(value) for value in values]
        labels = [values.index(label) for label in labels]
    return ImagePart(tuple(labelled), tuple(labels), tuple(names[number] for number in good), tuple(good), opener)


def _labels(opener: _SetOpener, numbers: Sequence[int]) -> list[int]:
    """Return the labels of these images, without decoding them if the set has labels in a usual attribute."""
    for field in ("targets", "labels", "_labels"):
        stored = getattr(opener.images, field, None)
        if stored is not None and len(stored) == len(opener.images) and all(_is_label(label) for label in stored):
            return [int(stored[number]) for number in numbers]
    labels = [opener.pair(number)[1] for number in numbers]
    if not labels or not all(_is_label(label) for label in labels):
        raise DataError(
            f"data.name must be a set of images with one class each; {opener.name} has "
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
