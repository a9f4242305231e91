"""Conversion of image files to inputs; its settings are saved with the adapted model."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from conservtl.errors import DataError
from conservtl.extras import require
from conservtl.spec_model import FrozenModel
from conservtl.tasks.bad_files import shown_name
from conservtl.tasks.vision.colour_modes import as_rgb_or_grey, check_frames
from conservtl.tasks.vision.image_settings import ImageSettings

__all__ = ["VisionPreprocessing", "open_image"]


def open_image(path: Path) -> Any:
    """Return the Pillow image of a file, the right way up: RGB, or mode F in [0, 1] for grey of more than 8 bits.

    Raises:
        DataError: the file cannot be read, has several images or values of an unknown range; the message names it.
    """
    pillow = require("PIL.Image", "vision")
    try:
        # Pillow's first limit on pixels is an error too, so that memory is bounded.
        with (
            warnings.catch_warnings(action="error", category=pillow.DecompressionBombWarning),
            pillow.open(path, formats=_formats()) as image,
        ):
            check_frames(image, shown_name(path))
            image.load()  # which turns a TIFF by its orientation
            return as_rgb_or_grey(image, shown_name(path))
    except DataError:
        raise
    except Exception as error:  # decoders raise whatever a damaged file makes them
        reason = str(error).replace(repr(str(path)), shown_name(path)) or type(error).__name__
        raise DataError(
            f"{shown_name(path)} must be an image that Pillow can read; reading it raises: {reason}. Replace or remove "
            "the file."
        ) from error


@cache
def _formats() -> list[str]:
    """Return the formats that Pillow can read here without another program."""
    pillow = require("PIL.Image", "vision")
    pillow.init()
    return [name for name in pillow.ID if name in pillow.OPEN and name not in _OUTSIDE_PROGRAMS]


_OUTSIDE_PROGRAMS = {"EPS"}  # Ghostscript would run the file
_MOST_PIXELS = 2**26  # of a resized image before the crop, which grows with the ratio of the sides


class VisionPreprocessing(FrozenModel):
    """Conversion of images to inputs: open, resize, crop and normalise."""

    kind: Literal["vision"] = "vision"
    """Kind of this section in a saved model."""

    images: ImageSettings
    """Size, crop, interpolation and normalisation."""

    def read(self, files: Sequence[Path]) -> Tensor:
        """Return inputs for these image files, (N, 3, size, size) float32."""
        pixels = [self._pixels_of(Path(file)) for file in files]
        size = self.images.size
        return self.normalise(torch.stack(pixels) if pixels else torch.empty(0, 3, size, size))

    def check(self, file: Path) -> None:
        """Raise unless an image can be read and converted."""
        self._pixels_of(file)

    def _pixels_of(self, file: Path) -> Tensor:
        return self.pixels(open_image(file), shown_name(file))

    def pixels(self, image: Any, subject: str = "an image") -> Tensor:
        """Return a Pillow image of any mode at the input's size, (3, size, size) float32, RGB in [0, 1].

        The steps and their rounding are torchvision's: resize the shorter side, crop the centre.

        Raises:
            DataError: one side is so much longer than the other that the resized image would not fit in memory.
        """
        pillow = require("PIL.Image", "vision")
        method = pillow.Resampling[self.images.interpolation.upper()]
        size, image = self.images.size, as_rgb_or_grey(image, subject)
        if self.images.crop == "squash":
            image = image if image.size == (size, size) else image.resize((size, size), method)
        else:
            target = _shorter_side(image.size, self.images.resize or size)
            if target[0] * target[1] > _MOST_PIXELS:
                raise DataError(
                    f"{subject} must have at most {_MOST_PIXELS:,} pixels once its shorter side is {min(target):,}; "
                    f"its sides are {image.width:,} and {image.height:,}. Crop it."
                )
            image = image if image.size == target else image.resize(target, method)
            left, top = round((image.width - size) / 2), round((image.height - size) / 2)
            image = image.crop((left, top, left + size, top + size))
        values = torch.from_numpy(np.array(image))
        if image.mode == "F":
            return values.clamp(0, 1).expand(3, size, size).contiguous()  # a resize may overshoot
        return values.permute(2, 0, 1).contiguous().float().div(255)

    def normalise(self, pixels: Tensor) -> Tensor:
        """Return normalised inputs for (..., 3, H, W) in [0, 1]."""
        mean = pixels.new_tensor(self.images.mean).view(3, 1, 1)
        std = pixels.new_tensor(self.images.std).view(3, 1, 1)
        return (pixels - mean) / std


def _shorter_side(size: tuple[int, int], length: int) -> tuple[int, int]:
    """Return the size with this length of the shorter side and the same aspect ratio (rounded down)."""
    width, height = size
    if width <= height:
        return length, int(length * height / width)
    return int(length * width / height), length
