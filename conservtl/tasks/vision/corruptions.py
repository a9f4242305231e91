"""Common corruptions of photographs, as in the published benchmarks.

Reference: Hendrycks & Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations", ICLR 2019 (arXiv 1903.12261): CIFAR-10-C, Tiny ImageNet-C and ImageNet-C.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from conservtl.bounds import NonNegativeInt
from conservtl.errors import SpecError, counted
from conservtl.spec_model import FrozenModel

__all__ = ["SEVERITIES", "Corruption", "Name", "corrupt", "strength_of"]

Name = Literal["gaussian_noise", "gaussian_blur", "defocus_blur", "contrast", "brightness"]

SEVERITIES: dict[int, dict[str, tuple[float, ...]]] = {
    32: {
        "gaussian_noise": (0.04, 0.06, 0.08, 0.09, 0.10),
        "gaussian_blur": (0.4, 0.6, 0.7, 0.8, 1.0),
        "defocus_blur": (0.3, 0.4, 0.5, 1.0, 1.5),
        "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),
        "brightness": (0.05, 0.1, 0.15, 0.2, 0.3),
    },
    64: {
        "gaussian_noise": (0.04, 0.08, 0.12, 0.15, 0.18),
        "gaussian_blur": (0.5, 0.75, 1.0, 1.25, 1.5),
        "defocus_blur": (0.5, 1.0, 1.5, 2.5, 3.0),
        "contrast": (0.4, 0.3, 0.2, 0.1, 0.05),
        "brightness": (0.1, 0.2, 0.3, 0.4, 0.5),
    },
    224: {
        "gaussian_noise": (0.08, 0.12, 0.18, 0.26, 0.38),
        "gaussian_blur": (1.0, 2.0, 3.0, 4.0, 6.0),
        "defocus_blur": (3.0, 4.0, 6.0, 8.0, 10.0),
        "contrast": (0.4, 0.3, 0.2, 0.1, 0.05),
        "brightness": (0.1, 0.2, 0.3, 0.4, 0.5),
    },
}
"""Strengths for image size of the benchmark, corruption and severity 1 to 5."""

# (Radius, size of the benchmark's images) -> blur of the disk's edge, in pixels.
_EDGES = {
    (0.3, 32): 0.4,
    (0.4, 32): 0.5,
    (0.5, 32): 0.6,
    (1.0, 32): 0.2,
    (0.5, 64): 0.6,
    (2.5, 64): 0.01,
    (4.0, 224): 0.5,
    (6.0, 224): 0.5,
    (8.0, 224): 0.5,
    (10.0, 224): 0.5,
}


class Corruption(FrozenModel):
    """A deterministic corruption of the target's images."""

    name: Name
    """Name of the corruption."""

    severity: int = Field(default=5, ge=1, le=5)
    """Severity, with the constants of CIFAR-10-C up to 32 pixels, of Tiny ImageNet-C up to 64 and of ImageNet-C for
    larger images."""

    strength: float | None = Field(default=None, gt=0, le=100, allow_inf_nan=False)
    """Replaces the severity: standard deviation of the noise (values in [0, 1]) or of the blur (pixels), radius of the
    disk (pixels), factor of the contrast, or shift of the brightness."""

    seed: NonNegativeInt = 0
    """Draws the noise, together with each image's name. It is independent of the run's seed, so that all runs have the
    same corrupted test images."""


def strength_of(corruption: Corruption, size: int) -> float:
    """Return the corruption's strength for images of this size (shorter side, pixels).

    >>> strength_of(Corruption(name="gaussian_blur", severity=5), 32)
    1.0
    >>> strength_of(Corruption(name="gaussian_blur", strength=1.2), 32)
    1.2
    """
    if corruption.strength is not None:
        return corruption.strength
    return SEVERITIES[_benchmark(size)][corruption.name][corruption.severity - 1]


def corrupt(images: Tensor, corruption: Corruption, names: Sequence[str]) -> Tensor:
    """Return corrupted images for (N, 3, H, W), RGB in [0, 1], before normalisation.

    Each result depends on the image, its name and the corruption only, not on other images. Values are rounded down to
    8 bits, as in the published sets.

    Returns:
        (N, 3, H, W) float32 in [0, 1], multiples of 1/255.

    Raises:
        SpecError: the numbers of names and images differ.
    """
    if len(names) != len(images):
        raise SpecError(
            f"names must have one name for each image; received {len(names)} for {counted(len(images), 'image')}."
        )
    if len(images) == 0:
        return images.to(torch.float32)
    size = min(images.shape[-2:])
    apply, strength = _APPLY[corruption.name], strength_of(corruption, size)
    results = [
        # double precision, as in the published code: single precision would round down by whole levels
        apply(image.double(), strength, _ImageDraws(corruption.seed, name, size)).clamp(0, 1)
        for image, name in zip(images, names, strict=True)
    ]
    return (torch.stack(results) * 255).floor().div(255).to(torch.float32)


class _ImageDraws:
    """Random numbers of one image, and the benchmark of its size."""

    def __init__(self, seed: int, name: str, size: int) -> None:
        self.key = f"{seed}:{name}"
        self.benchmark = _benchmark(size)

    def normal(self, image: Tensor) -> Tensor:
        digest = hashlib.sha256(self.key.encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        return torch.randn(image.shape, generator=generator, dtype=image.dtype).to(image.device)


def _benchmark(size: int) -> int:
    return next((known for known in sorted(SEVERITIES) if size <= known), max(SEVERITIES))


def _gaussian_noise(image: Tensor, sigma: float, draw: _ImageDraws) -> Tensor:
    return image + sigma * draw.normal(image)


def _gaussian_blur(image: Tensor, sigma: float, _draw: _ImageDraws) -> Tensor:
    """Blur with repeated edges and a kernel of four sigma, as skimage.filters.gaussian does."""
    kernel = _gaussian(int(4 * sigma + 0.5), sigma).to(image)
    radius = len(kernel) // 2
    planes = functional.pad(image[None], (radius, radius, radius, radius), mode="replicate")[0][:, None]
    planes = functional.conv2d(planes, kernel.view(1, 1, -1, 1))
    return functional.conv2d(planes, kernel.view(1, 1, 1, -1))[:, 0]


def _defocus_blur(image: Tensor, radius: float, draw: _ImageDraws) -> Tensor:
    """Blur with a disk and with mirrored edges, not repeated, as OpenCV's filter2D does."""
    kernel = _disk(radius, _EDGES.get((radius, draw.benchmark), 0.1)).to(image)
    reach = len(kernel) // 2
    planes = _mirror(_mirror(image, reach, -1), reach, -2)[:, None]
    return functional.conv2d(planes, kernel[None, None])[:, 0]


def _contrast(image: Tensor, factor: float, _draw: _ImageDraws) -> Tensor:
    mean = image.mean(dim=(-2, -1), keepdim=True)
    return (image - mean) * factor + mean


def _brightness(image: Tensor, shift: float, _draw: _ImageDraws) -> Tensor:
    """Raise the value in hue, saturation and value, which scales the colours in RGB."""
    value = image.amax(dim=0, keepdim=True)
    raised = (value + shift).clamp(max=1)
    # black becomes grey
    return torch.where(value > 0, image * (raised / value.clamp(min=1e-12)), raised)


def _gaussian(radius: int, sigma: float) -> Tensor:
    at = torch.arange(-radius, radius + 1, dtype=torch.float64)
    weights = torch.exp(-(at**2) / (2 * sigma**2))
    return weights / weights.sum()


def _disk(radius: float, edge: float) -> Tensor:
    """Return a disk of this radius (pixels) with a blurred edge: a square kernel of odd size with the sum 1."""
    reach, half = (8, 1) if radius <= 8 else (int(radius), 2)
    at = torch.arange(-reach, reach + 1, dtype=torch.float64)
    disk = ((at[:, None] ** 2 + at**2) <= radius**2).double()
    disk = _mirror(_mirror(disk / disk.sum(), half, -1), half, -2)
    kernel = _gaussian(half, edge)
    disk = functional.conv2d(disk[None, None], (kernel[:, None] * kernel)[None, None])[0, 0]
    radius = int(disk[reach].nonzero().amax()) - reach  # without zeros, so that small images can be mirrored
    return disk[reach - radius : reach + radius + 1, reach - radius : reach + radius + 1]


def _mirror(values: Tensor, reach: int, dim: int) -> Tensor:
    """Extend by ``reach`` on both sides, mirrored at the edge; images may be smaller than ``reach``."""
    length = values.shape[dim]
    period = max(2 * (length - 1), 1)
    at = torch.arange(-reach, length + reach, device=values.device).abs() % period
    return values.index_select(dim, torch.minimum(at, period - at))


_APPLY: dict[str, Callable[[Tensor, float, _ImageDraws], Tensor]] = {
    "gaussian_noise": _gaussian_noise,
    "gaussian_blur": _gaussian_blur,
    "defocus_blur": _defocus_blur,
    "contrast": _contrast,
    "brightness": _brightness,
}
