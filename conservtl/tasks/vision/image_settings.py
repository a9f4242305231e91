"""Settings of the conversion of an image to an input: size, crop, interpolation and normalisation."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from conservtl.bounds import Share
from conservtl.spec_model import FrozenModel

__all__ = ["CIFAR_IMAGES", "IMAGENET_IMAGES", "ImageSettings"]

_Positive = Annotated[float, Field(gt=0, le=10)]


class ImageSettings(FrozenModel):
    """Size, crop and normalisation of images."""

    size: int = Field(default=224, ge=4, le=4096)
    """Height and width of the input in pixels."""

    resize: int | None = Field(default=None, ge=4, le=8192)
    """Length of the shorter side in pixels before the crop of the centre; null for `size`."""

    crop: Literal["center", "squash"] = "center"
    """`center` keeps the aspect ratio and crops the centre; `squash` resizes both sides to `size`."""

    mean: tuple[Share, Share, Share] = (0.485, 0.456, 0.406)
    """Mean of red, green and blue, subtracted from values in [0, 1]."""

    std: tuple[_Positive, _Positive, _Positive] = (0.229, 0.224, 0.225)
    """Standard deviation of red, green and blue, the divisor after the subtraction."""

    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"] = "bilinear"
    """Interpolation of the resize."""

    @model_validator(mode="after")
    def _the_crop_fits(self) -> Self:
        if self.resize is not None and self.resize < self.size:
            raise ValueError(
                f"images.resize must not be smaller than images.size, the size of the crop; received "
                f"resize {self.resize} and size {self.size}. Raise resize, or remove it."
            )
        return self


CIFAR_IMAGES = ImageSettings(size=32)
"""Settings of the published CIFAR weights of small residual networks."""

IMAGENET_IMAGES = ImageSettings(size=224, resize=256)
"""Usual settings for ImageNet, for models without published weights."""
