"""Corruptions against plain references, and the laws all of them keep."""

import colorsys
import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from conservtl.errors import SpecError
from conservtl.tasks.vision import Corruption, corrupt
from conservtl.tasks.vision.corruptions import SEVERITIES, _mirror, strength_of

NAMES = ("gaussian_noise", "gaussian_blur", "defocus_blur", "contrast", "brightness")


def _images(count=3, size=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 8, 8, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")
    fine = torch.rand(count, 3, size, size, generator=generator)
    return ((0.8 * smooth + 0.2 * fine) * 255).round() / 255


def _names(count):
    return [f"image_{i}" for i in range(count)]


def _levels(values):
    return np.floor(np.clip(values, 0, 1) * 255) / 255


def _same(ours, reference):
    """Equal but for single 8-bit levels where rounding down meets a tie."""
    difference = np.abs(ours.double().numpy() - reference) * 255
    return difference.max() <= 1.001 and (difference > 0.5).mean() < 0.02


def test_the_constants_at_32_pixels_are_those_of_cifar_10_c():
    assert SEVERITIES[32] == {
        "gaussian_noise": (0.04, 0.06, 0.08, 0.09, 0.10),
        "gaussian_blur": (0.4, 0.6, 0.7, 0.8, 1),
        "defocus_blur": (0.3, 0.4, 0.5, 1, 1.5),
        "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),
        "brightness": (0.05, 0.1, 0.15, 0.2, 0.3),
    }


@pytest.mark.parametrize(("size", "sigma"), [(16, 1.0), (32, 1.0), (64, 1.5), (224, 6.0), (300, 6.0)])
def test_larger_images_take_the_constants_of_the_larger_benchmarks(size, sigma):
    assert strength_of(Corruption(name="gaussian_blur", severity=5), size) == sigma


@pytest.mark.parametrize("severity", range(1, 6))
def test_gaussian_blur_is_scipys_with_repeated_edges(severity):
    ndimage = pytest.importorskip("scipy.ndimage")
    images = _images()
    sigma = SEVERITIES[32]["gaussian_blur"][severity - 1]
    ours = corrupt(images, Corruption(name="gaussian_blur", severity=severity), _names(3))
    blurred = ndimage.gaussian_filter(images.double().numpy(), (0, 0, sigma, sigma), mode="nearest")
    assert _same(ours, _levels(blurred))


@pytest.mark.parametrize(("severity", "radius", "edge"), [(1, 0.3, 0.4), (3, 0.5, 0.6), (5, 1.5, 0.1)])
def test_defocus_blur_is_a_correlation_with_a_soft_disk_and_mirrored_edges(severity, radius, edge):
    ndimage = pytest.importorskip("scipy.ndimage")
    at = np.arange(-8, 9)
    disk = (at[:, None] ** 2 + at**2 <= radius**2).astype(float)
    side = math.exp(-1 / (2 * edge**2))
    line = np.array([side, 1, side]) / (1 + 2 * side)
    kernel = ndimage.correlate(disk / disk.sum(), np.outer(line, line), mode="mirror")
    images = _images()
    expected = ndimage.correlate(images.double().numpy(), kernel[None, None], mode="mirror")
    ours = corrupt(images, Corruption(name="defocus_blur", severity=severity), _names(3))
    assert _same(ours, _levels(expected))


def test_contrast_shrinks_each_channel_towards_its_own_mean():
    images = _images()
    values = images.double().numpy()
    mean = values.mean(axis=(2, 3), keepdims=True)
    ours = corrupt(images, Corruption(name="contrast", severity=5), _names(3))
    assert _same(ours, _levels((values - mean) * 0.15 + mean))


def test_brightness_raises_the_value_of_hsv_also_of_black():
    images = _images(1, size=8)
    images[0, :, 0, 0] = 0.0
    images[0, :, 0, 1] = 1.0
    expected = np.zeros((3, 8, 8))
    for row in range(8):
        for column in range(8):
            hue, saturation, value = colorsys.rgb_to_hsv(*images[0, :, row, column].double().tolist())
            raised = min(value + 0.3, 1.0)
            expected[:, row, column] = colorsys.hsv_to_rgb(hue, saturation, raised)
    ours = corrupt(images, Corruption(name="brightness", severity=5), _names(1))[0]
    difference = np.abs(ours.numpy() - _levels(expected)) * 255
    assert difference.max() <= 1.001
    assert ours[:, 0, 0].tolist() == pytest.approx([76 / 255] * 3)


def test_noise_has_the_strength_asked_for_and_no_mean():
    grey = torch.full((20, 3, 32, 32), 0.5)
    noise = corrupt(grey, Corruption(name="gaussian_noise", severity=5), _names(20)) - 0.5
    assert float(noise.std()) == pytest.approx(0.1, rel=0.02)
    assert float(noise.mean()) == pytest.approx(-0.5 / 255, abs=1e-3)  # rounding down costs half a level


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [32, 64, 72])
def test_severity_is_monotone(name, size):
    images = _images(1, size=size)
    moved = [
        float((corrupt(images, Corruption(name=name, severity=s), _names(1)) - images).square().mean())
        for s in range(1, 6)
    ]
    assert moved == sorted(moved)
    assert moved[-1] > moved[0]


@pytest.mark.parametrize("name", NAMES)
def test_an_image_is_corrupted_the_same_alone_and_in_any_batch(name):
    images, corruption = _images(4), Corruption(name=name, severity=4)
    together = corrupt(images, corruption, _names(4))
    reverse = corrupt(images.flip(0), corruption, _names(4)[::-1]).flip(0)
    alone = torch.cat([corrupt(images[i : i + 1], corruption, [f"image_{i}"]) for i in range(4)])
    assert torch.equal(together, reverse)
    assert torch.equal(together, alone)


@pytest.mark.parametrize("name", NAMES)
def test_results_are_8_bit_levels_between_0_and_1(name):
    result = corrupt(_images(), Corruption(name=name), _names(3))
    assert result.dtype == torch.float32
    assert result.min() >= 0
    assert result.max() <= 1
    assert torch.allclose(result * 255, (result * 255).round(), atol=1e-3)


def test_the_noise_follows_seed_and_name_alone():
    image = _images(1)
    corruption = Corruption(name="gaussian_noise")
    state = torch.get_rng_state()
    first = corrupt(image, corruption, ["a"])
    assert torch.equal(first, corrupt(image, corruption, ["a"]))
    assert not torch.equal(first, corrupt(image, corruption, ["b"]))
    assert not torch.equal(first, corrupt(image, corruption.model_copy(update={"seed": 1}), ["a"]))
    assert torch.equal(state, torch.get_rng_state())


def test_a_strength_replaces_the_severity():
    images = _images()
    one = corrupt(images, Corruption(name="contrast", strength=0.15, severity=1), _names(3))
    assert torch.equal(one, corrupt(images, Corruption(name="contrast", severity=5), _names(3)))


def test_large_disks_work_on_images_smaller_than_they_are():
    images = _images(1, size=6)
    blurred = corrupt(images, Corruption(name="defocus_blur", strength=10), _names(1))
    assert blurred.shape == images.shape
    assert _mirror(torch.arange(3.0), 4, 0).tolist() == [0, 1, 2, 1, 0, 1, 2, 1, 0, 1, 2]


def test_one_name_an_image():
    with pytest.raises(SpecError, match="one name for each image; received 1 for 3"):
        corrupt(_images(), Corruption(name="contrast"), ["a"])


@pytest.mark.parametrize(
    "fields", [{"name": "fog"}, {"name": "contrast", "severity": 6}, {"name": "contrast", "strength": 0}]
)
def test_what_is_not_defined_is_refused(fields):
    with pytest.raises(ValidationError):
        Corruption.model_validate(fields)


def test_no_images_stay_none():
    found = corrupt(torch.zeros(0, 3, 8, 8, dtype=torch.float64), Corruption(name="contrast"), ())
    assert (found.shape, found.dtype) == ((0, 3, 8, 8), torch.float32)
