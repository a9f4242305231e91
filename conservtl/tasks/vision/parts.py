"""Parts of an image set, listed without opening images, and their reading."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from conservtl.data import Data, Examples, carve
from conservtl.data.shots import Shots, number_of_shots
from conservtl.errors import DataError
from conservtl.tasks.vision.corruptions import Corruption, corrupt
from conservtl.tasks.vision.preprocessing import VisionPreprocessing

__all__ = ["IN_MEMORY", "ImagePart", "LazyImages", "Parts", "draw_from_pool", "read", "split"]

IN_MEMORY = 2**30
"""Largest size in bytes, as float32 inputs, of a part that is read into memory."""


@dataclass(frozen=True)
class ImagePart:
    """A list of images that are not opened yet.

    Args:
        classes: names of the classes, in the order of the model's outputs.
        labels: N positions in ``classes``.
        names: N names of the images, for people.
        ids: N numbers of the images in their set.
        opener: number of an image -> Pillow image; picklable, for loaders with workers.
    """

    classes: tuple[str, ...]
    labels: tuple[int, ...]
    names: tuple[str, ...]
    ids: tuple[int, ...]
    opener: Callable[[int], Any]

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, index: Sequence[int]) -> ImagePart:
        """Return the images at these positions, in this order."""
        return ImagePart(
            self.classes,
            tuple(self.labels[i] for i in index),
            tuple(self.names[i] for i in index),
            tuple(self.ids[i] for i in index),
            self.opener,
        )


@dataclass(frozen=True)
class Parts:
    """The images of the two domains of a run, not opened yet.

    Args:
        pool: the target's images from which the shots are drawn.
        test: the target's test images; None for the rest of the pool.
        source_labels: names of the source's classes; empty without source data.
        source_train: the source's training images, or None.
        source_test: the source's test images, or None.
        corruption: corruption of the pool and the test images, not of the source.
        skipped: names of files that are left out because they cannot be used -> why.
    """

    pool: ImagePart
    test: ImagePart | None
    source_labels: tuple[str, ...] = ()
    source_train: ImagePart | None = None
    source_test: ImagePart | None = None
    corruption: Corruption | None = None
    skipped: Mapping[str, str] = field(default_factory=dict)


class LazyImages(Dataset[tuple[Tensor, Tensor]]):
    """Dataset of images that are opened, corrupted and normalised on access.

    ``labels`` (N,) int64 and ``names`` are available without opening images.
    """

    def __init__(self, part: ImagePart, preprocessing: VisionPreprocessing, corruption: Corruption | None) -> None:
        self.labels = torch.tensor(part.labels, dtype=torch.long)
        self.names = part.names
        self._part, self._preprocessing, self._corruption = part, preprocessing, corruption

    def __len__(self) -> int:
        return len(self._part)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return the input (3, size, size) float32 and its label, int64."""
        part = self._part.take([index])
        return _inputs(part, self._preprocessing, self._corruption)[0], self.labels[index]


def read(
    part: ImagePart,
    preprocessing: VisionPreprocessing,
    corruption: Corruption | None = None,
    *,
    in_memory: int = IN_MEMORY,
) -> Data:
    """Return a part's examples in memory if they fit, else a dataset that opens images on access."""
    if len(part) * 3 * preprocessing.images.size**2 * 4 > in_memory:
        return LazyImages(part, preprocessing, corruption)
    labels = torch.tensor(part.labels, dtype=torch.long)
    return Examples(_inputs(part, preprocessing, corruption), labels, part.names)


def split(part: ImagePart, fraction: float, seed: int, owner: str) -> tuple[ImagePart, ImagePart]:
    """Split each class of a part, of 2 images at least, into training and test images, by ``seed``."""
    for position, name in enumerate(part.classes):
        if part.labels.count(position) < 2:
            raise DataError(
                f"{owner}: class {name!r} must have at least 2 images to be split into training and test; "
                f"it has {part.labels.count(position)}. Add images, or train/ and test/ folders."
            )
    train, test = carve(part.labels, fraction, seed)
    return part.take(train), part.take(test)


def draw_from_pool(pool: ImagePart, shots: Shots, seed: int) -> ImagePart:
    """Draw ``shots`` images of each class from a pool without test images, by ``seed``."""
    generator = torch.Generator().manual_seed(seed)
    chosen: list[int] = []
    for position, name in enumerate(pool.classes):
        members = [i for i, label in enumerate(pool.labels) if label == position]
        if isinstance(shots, int) and len(members) < shots:
            raise DataError(
                f"data.shots must not exceed the number of images of a class; received {shots}, and class {name!r} "
                f"has {len(members)} beside the test part. Set data.shots to at most {len(members)}, or to "
                f"{{up_to: {shots}}}."
            )
        count = number_of_shots(shots, len(members))
        chosen += [members[i] for i in torch.randperm(len(members), generator=generator)[:count].tolist()]
    return pool.take(sorted(chosen))


def _inputs(part: ImagePart, preprocessing: VisionPreprocessing, corruption: Corruption | None) -> Tensor:
    size = preprocessing.images.size
    pixels = [preprocessing.pixels(part.opener(i), name) for i, name in zip(part.ids, part.names, strict=True)]
    images = torch.stack(pixels) if pixels else torch.empty(0, 3, size, size)
    if corruption is not None:
        images = corrupt(images, corruption, part.names)
    return preprocessing.normalise(images)
