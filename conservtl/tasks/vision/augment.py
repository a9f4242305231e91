"""Random augmentation of a batch of images, drawn for each image from one generator."""

from __future__ import annotations

import math
from typing import Annotated, Self

import torch
from pydantic import Field, model_validator
from torch import Generator, Tensor
from torch.nn import functional

from conservtl.bounds import Fraction
from conservtl.spec_model import FrozenModel

__all__ = ["VisionAugment", "usual_augment"]

_Ratio = Annotated[float, Field(gt=0, le=10)]

SMALL = 64
"""Largest size (pixels) of images that are shifted; larger images are cropped and resized."""


class VisionAugment(FrozenModel):
    """Flips, shifts and crops, on the device of the images.

    Example:
        >>> images = torch.arange(12.0).view(1, 1, 3, 4)
        >>> augment = VisionAugment(flip=True)
        >>> augment(images, torch.Generator().manual_seed(0)).shape
        torch.Size([1, 1, 3, 4])
    """

    flip: bool = True
    """Mirror images horizontally with probability 0.5. Not for digits or letters."""

    shift: int = Field(default=0, ge=0, le=512)
    """Largest shift in pixels in each direction; the gap is filled with the image mirrored at its edge."""

    scale: tuple[Fraction, Fraction] | None = None
    """Smallest and largest share of the area of a random crop, which is resized to the full size; null for none."""

    ratio: tuple[_Ratio, _Ratio] = (3 / 4, 4 / 3)
    """Smallest and largest ratio of the crop's width to its height."""

    @model_validator(mode="after")
    def _ranges_rise(self) -> Self:
        for name, bounds in (("scale", self.scale), ("ratio", self.ratio)):
            if bounds is not None and bounds[0] > bounds[1]:
                raise ValueError(f"augment.{name} must be (smallest, largest); received {bounds}. Swap the two.")
        return self

    def __call__(self, inputs: Tensor, generator: Generator) -> Tensor:
        """Return augmented images of the same shape, (N, C, H, W), with random numbers from ``generator`` only."""
        if self.scale is not None:
            inputs = _crop(inputs, self.scale, self.ratio, generator)
        if self.shift:
            inputs = _shift(inputs, self.shift, generator)
        if self.flip:
            mirrored = torch.rand(len(inputs), generator=generator, device=generator.device) < 0.5
            inputs = torch.where(mirrored.to(inputs.device)[:, None, None, None], inputs.flip(-1), inputs)
        return inputs


def usual_augment(size: int, *, flip: bool = True) -> VisionAugment:
    """Return the usual augmentation for a size: shifts of up to an eighth for small images, else resized crops.

    Reference: He et al. 2016, section 4.2 (shifts by 4 of 32 pixels); Szegedy et al., "Going Deeper
    with Convolutions", CVPR 2015 (crops of 8 to 100 % of the area).
    """
    if size <= SMALL:
        return VisionAugment(flip=flip, shift=size // 8)
    return VisionAugment(flip=flip, scale=(0.08, 1.0))


def _shift(inputs: Tensor, largest: int, generator: Generator) -> Tensor:
    count, _, height, width = inputs.shape
    reach = min(largest, height - 1, width - 1)  # a mirrored image is no larger than the image
    padded = functional.pad(inputs, (reach, reach, reach, reach), mode="reflect")
    offsets = torch.randint(0, 2 * reach + 1, (2, count, 1), generator=generator, device=generator.device)
    down, right = offsets.to(inputs.device)
    rows = down + torch.arange(height, device=inputs.device)
    columns = right + torch.arange(width, device=inputs.device)
    image = torch.arange(count, device=inputs.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)


def _crop(inputs: Tensor, scale: tuple[float, float], ratio: tuple[float, float], generator: Generator) -> Tensor:
    count, _, height, width = inputs.shape
    draw = torch.rand(4, count, generator=generator, device=generator.device).to(inputs.device)
    area = scale[0] + (scale[1] - scale[0]) * draw[0]
    low, high = math.log(ratio[0]), math.log(ratio[1])
    shape = torch.exp(low + (high - low) * draw[1]) * (height / width)  # in shares of width and height
    wide = (area * shape).sqrt().clamp(max=1)
    tall = (area / shape).sqrt().clamp(max=1)
    theta = torch.zeros(count, 2, 3, device=inputs.device, dtype=inputs.dtype)
    theta[:, 0, 0], theta[:, 1, 1] = wide, tall
    theta[:, 0, 2] = (2 * draw[2] - 1) * (1 - wide)
    theta[:, 1, 2] = (2 * draw[3] - 1) * (1 - tall)
    grid = functional.affine_grid(theta, list(inputs.shape), align_corners=False)
    return functional.grid_sample(inputs, grid, padding_mode="border", align_corners=False)
