"""Parts of an image set, listed before anything is opened, and how they are read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from conservtl.data import Data, Examples, carve
from conservtl.errors import DataError
from conservtl.tasks.vision.corruptions import Corruption, corrupt
from conservtl.tasks.vision.preprocessing import VisionPreprocessing

__all__ = ["IN_MEMORY", "ImagePart", "LazyImages", "Parts", "draw_from_pool", "read", "split"]

IN_MEMORY = 2**30
"""Parts of up to this many bytes, as float32 inputs, are read into memory."""


@dataclass(frozen=True)
class ImagePart:
    """Images that have not been opened yet.

    Args:
        classes: the label names, in the order of the model's outputs.
        labels: N positions in ``classes``.
        names: N names that a person can find the images by.
        ids: N numbers of the images in the set they come from.
        opener: from such a number to an image of Pillow.
    """

    classes: tuple[str, ...]
    labels: tuple[int, ...]
    names: tuple[str, ...]
    ids: tuple[int, ...]
    opener: Callable[[int], Any]

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, index: Sequence[int]) -> ImagePart:
        """The images at these positions, in this order."""
        return ImagePart(
            self.classes,
            tuple(self.labels[i] for i in index),
            tuple(self.names[i] for i in index),
            tuple(self.ids[i] for i in index),
            self.opener,
        )


@dataclass(frozen=True)
class Parts:
    """The two domains of a run, unopened.

    Args:
        pool: the target's images to draw the shots from.
        test: the target's images to test with; None: whatever is left of the pool.
        source_labels: empty where the source comes without data.
        source_train: the source's images to train with, or None.
        source_test: the source's images to test with, or None.
        corruption: of the pool and the test part, never of the source.
    """

    pool: ImagePart
    test: ImagePart | None
    source_labels: tuple[str, ...] = ()
    source_train: ImagePart | None = None
    source_test: ImagePart | None = None
    corruption: Corruption | None = None


class LazyImages(Dataset[tuple[Tensor, Tensor]]):
    """Images that are opened, corrupted and normalised when asked for.

    ``labels`` (N,) int64 and ``names`` can be read without opening any.
    """

    def __init__(self, part: ImagePart, preprocessing: VisionPreprocessing, corruption: Corruption | None) -> None:
        self.labels = torch.tensor(part.labels, dtype=torch.long)
        self.names = part.names
        self._part, self._preprocessing, self._corruption = part, preprocessing, corruption

    def __len__(self) -> int:
        return len(self._part)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """The input (3, size, size) float32 and its label, int64."""
        one = self._part.take([index])
        return _inputs(one, self._preprocessing, self._corruption)[0], self.labels[index]


def read(
    part: ImagePart,
    preprocessing: VisionPreprocessing,
    corruption: Corruption | None = None,
    *,
    in_memory: int = IN_MEMORY,
) -> Data:
    """Open a part: examples in memory where they fit, else a dataset that opens them one by one.

    Raises:
        DataError: an image cannot be read; the message names it.
    """
    if len(part) * 3 * preprocessing.images.size**2 * 4 > in_memory:
        return LazyImages(part, preprocessing, corruption)
    labels = torch.tensor(part.labels, dtype=torch.long)
    return Examples(_inputs(part, preprocessing, corruption), labels, part.names)


def split(part: ImagePart, fraction: float, seed: int, owner: str) -> tuple[ImagePart, ImagePart]:
    """Split a part class by class into one to train with and one to test with, by ``seed``.

    Raises:
        DataError: a class has a single image.
    """
    for position, name in enumerate(part.classes):
        if part.labels.count(position) < 2:
            raise DataError(
                f"{owner}: class {name!r} must have at least 2 images to be split into training and test; "
                f"it has {part.labels.count(position)}. Add images, or train/ and test/ folders."
            )
    train, test = carve(part.labels, fraction, seed)
    return part.take(train), part.take(test)


def draw_from_pool(pool: ImagePart, shots: int, seed: int) -> ImagePart:
    """``shots`` images a class, drawn by ``seed``, where the test part stands apart from the pool.

    Raises:
        DataError: a class has fewer.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen: list[int] = []
    for position, name in enumerate(pool.classes):
        own = [i for i, label in enumerate(pool.labels) if label == position]
        if len(own) < shots:
            raise DataError(
                f"data.shots must not exceed the images of a class; class {name!r} has {len(own)} to draw "
                f"from, and {shots} are asked for. Ask for at most {len(own)}."
            )
        chosen += [own[i] for i in torch.randperm(len(own), generator=generator)[:shots].tolist()]
    return pool.take(sorted(chosen))


def _inputs(part: ImagePart, preprocessing: VisionPreprocessing, corruption: Corruption | None) -> Tensor:
    size = preprocessing.images.size
    pixels = [preprocessing.pixels(part.opener(i)) for i in part.ids]
    images = torch.stack(pixels) if pixels else torch.empty(0, 3, size, size)
    if corruption is not None:
        images = corrupt(images, corruption, part.names)
    return preprocessing.normalise(images)
