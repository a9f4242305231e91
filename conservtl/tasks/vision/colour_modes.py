"""Pillow images of any mode as 8-bit RGB or as grey values in [0, 1], the right way up."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from conservtl.errors import DataError
from conservtl.extras import require

__all__ = ["as_rgb_or_grey", "check_frames"]

_ORIENTATION = 0x0112  # EXIF tag
_TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
_DEEPEST = 65535  # largest value of a 16-bit image
_STRAIGHT = {"RGBa": "RGBA", "La": "LA", "PA": "RGBA"}
_BITS = 258  # TIFF tag: bits of a sample
_ANIMATED = {"GIF", "PNG", "WEBP", "AVIF"}  # a second frame of other formats is a thumbnail or a preview


def as_rgb_or_grey(image: Any, subject: str) -> Any:
    """Return an image as mode RGB, or as mode F with values in [0, 1] for grey images of more than 8 bits.

    The image stays as it is. The orientation of EXIF is applied. A transparency is left out, as in torchvision. 16-bit
    values are divided by 65,535, and floating-point values must lie in [0, 1] already.

    Raises:
        DataError: the range of the values is unknown, or the picture is in the transparency alone.
    """
    method = _TURNS.get(_orientation(image))
    converted = _grey(image, subject) if image.mode[:1] in ("I", "F") else _rgb(image, subject)
    if method is not None:
        converted = converted.transpose(require("PIL.Image", "vision").Transpose[method])
    converted.info = {}  # it holds the orientation, which must not be applied again
    return converted


def check_frames(image: Any, subject: str) -> None:
    """Raise unless a file has one image: it is no animation, and no stack of pages of one size."""
    count = getattr(image, "n_frames", 1)
    if count == 1 or (image.format not in _ANIMATED and not _is_stack(image, count)):
        return
    raise DataError(f"{subject} must have one image; it has {count}. Save the one to use as a file of its own.")


def _is_stack(image: Any, count: int) -> bool:
    if image.format != "TIFF":
        return False
    sizes = set()
    for number in range(count):
        image.seek(number)
        sizes.add(image.size)
    image.seek(0)
    return len(sizes) == 1


def _orientation(image: Any) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except (OSError, SyntaxError, TypeError, ValueError, struct.error):
        return 1  # damaged EXIF does not say how to turn the image


def _grey(image: Any, subject: str) -> Any:
    values = np.asarray(image)
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
    if image.mode == "F":
        if not (low >= 0 and high <= 1):  # also for NaN
            raise DataError(
                f"{subject} must have values in [0, 1], because it is of floating-point numbers; they go from {low:g} "
                f"to {high:g}. Scale them, or save the image with 8 or 16 bits."
            )
        return _from_values(values)
    if image.mode == "I" and (image.format not in ("PNG", "PPM") or low < 0 or high > _DEEPEST):
        raise DataError(
            f"{subject} must have values of a known range; it has 32-bit integers from {low:g} to {high:g}. Save it "
            "with 8 or 16 bits."
        )
    bits = image.tag_v2.get(_BITS, (16,))[0] if image.format == "TIFF" else 16
    return _from_values(values.astype(np.float64) / (2**bits - 1))


def _from_values(values: NDArray[Any]) -> Any:
    return require("PIL.Image", "vision").fromarray(values.astype(np.float32))


def _rgb(image: Any, subject: str) -> Any:
    if image.mode in _STRAIGHT or "transparency" in image.info:
        image = image.convert(_STRAIGHT.get(image.mode, "RGBA"))  # Pillow warns if a palette loses its transparency
    rgb = image.convert("RGB")
    if "A" in image.getbands():
        low, high = image.getchannel("A").getextrema()
        if low < high and all(darkest == brightest for darkest, brightest in rgb.getextrema()):
            raise DataError(
                f"{subject} must have a picture in its colours; they are one colour everywhere, and the picture is in "
                "the transparency, which is left out. Save it on a background."
            )
    return rgb
