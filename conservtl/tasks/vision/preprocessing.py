"""Conversion of image files to inputs; its settings are saved with the adapted model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from conservtl.errors import DataError
from conservtl.extras import require
from conservtl.spec_model import FrozenModel
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
        with pillow.open(path) as image:
            check_frames(image, str(path))
            image.load()  # which turns a TIFF by its orientation
            return as_rgb_or_grey(image, str(path))
    except (OSError, SyntaxError, ValueError, pillow.DecompressionBombError) as error:
        raise DataError(
            f"{path} must be an image that Pillow can read; reading it raises: {error}. Replace or remove the file."
        ) from error


class VisionPreprocessing(FrozenModel):
    """Conversion of images to inputs: open, resize, crop and normalise."""

    kind: Literal["vision"] = "vision"
    """Kind of this section in a saved model."""

    images: ImageSettings
    """Size, crop, interpolation and normalisation."""

    def read(self, files: Sequence[Path]) -> Tensor:
        """Return inputs for these image files, (N, 3, size, size) float32.

        Raises:
            DataError: a file cannot be read; the message names it.
        """
        pixels = [self.pixels(open_image(Path(file))) for file in files]
        size = self.images.size
        return self.normalise(torch.stack(pixels) if pixels else torch.empty(0, 3, size, size))

    def pixels(self, image: Any) -> Tensor:
        """Return a Pillow image of any mode at the input's size, (3, size, size) float32, RGB in [0, 1].

        The steps and their rounding are torchvision's: resize the shorter side, crop the centre.
        """
        pillow = require("PIL.Image", "vision")
        method = pillow.Resampling[self.images.interpolation.upper()]
        size, image = self.images.size, as_rgb_or_grey(image, "an image")
        if self.images.crop == "squash":
            image = image if image.size == (size, size) else image.resize((size, size), method)
        else:
            target = _shorter_side(image.size, self.images.resize or size)
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
