"""scikit-learn's digits as two domains."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from conservtl.extras import require
from conservtl.tasks.vision.datasets import DigitsData
from conservtl.tasks.vision.parts import ImagePart, Parts, split

__all__ = ["digits_parts"]


def digits_parts(data: DigitsData) -> Parts:
    """Return the source's and the target's digits; the target's test part is all images but the shots."""
    digits = require("sklearn.datasets", "vision").load_digits()
    # 17 levels, scaled to 8 bits
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    source = _part(images, digits.target, data.source)
    train, test = split(source, data.test_fraction, data.split_seed, "data.source")
    return Parts(_part(images, digits.target, data.target), None, source.classes, train, test)


def _opened(images: NDArray[np.uint8], number: int) -> Any:
    """Return a digit by its number, as a Pillow image."""
    return require("PIL.Image", "vision").fromarray(images[number])


def _part(images: NDArray[np.uint8], values: NDArray[np.int64], digits: Sequence[int]) -> ImagePart:
    classes = sorted(digits)
    ids = tuple(i for i, value in enumerate(values.tolist()) if value in classes)
    return ImagePart(
        tuple(str(digit) for digit in classes),
        tuple(classes.index(int(values[i])) for i in ids),
        tuple(f"digit_{int(values[i])}_{i:04d}" for i in ids),
        ids,
        partial(_opened, images),
    )
