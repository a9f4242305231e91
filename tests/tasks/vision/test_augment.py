"""Random changes of a batch: drawn from one generator, image by image."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from conservtl.tasks.vision import VisionAugment
from conservtl.tasks.vision.augment import usual_augment


@given(st.integers(1, 5), st.integers(4, 12), st.integers(4, 12), st.integers(0, 9))
def test_shape_and_determinism(count, height, width, seed):
    augment = VisionAugment(shift=3, scale=(0.3, 1.0))
    images = torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0))
    kept, state = images.clone(), torch.get_rng_state()
    one, again = (augment(images, torch.Generator().manual_seed(seed)) for _ in range(2))
    assert one.shape == images.shape
    assert torch.equal(one, again)
    assert torch.equal(images, kept)
    assert torch.equal(state, torch.get_rng_state())


def test_a_flip_mirrors_about_half_of_the_images():
    images = torch.rand(400, 1, 2, 3)
    flipped = VisionAugment()(images, torch.Generator().manual_seed(0))
    mirrored = (flipped == images.flip(-1)).all(dim=(1, 2, 3))
    same = (flipped == images).all(dim=(1, 2, 3))
    assert bool((mirrored | same).all())
    assert 150 < int(mirrored.sum()) < 250


def test_a_shift_moves_each_image_by_itself():
    images = torch.arange(64.0).view(1, 1, 8, 8).repeat(50, 1, 1, 1)
    moved = VisionAugment(flip=False, shift=2)(images, torch.Generator().manual_seed(0))
    inner = moved[:, 0, 3, 3] - images[:, 0, 3, 3]
    assert set(inner.tolist()) <= {float(8 * r + c) for r in range(-2, 3) for c in range(-2, 3)}
    assert len(set(inner.tolist())) > 10


def test_a_whole_crop_changes_nothing():
    images = torch.rand(3, 3, 9, 9)
    augment = VisionAugment(flip=False, scale=(1.0, 1.0), ratio=(1.0, 1.0))
    assert torch.allclose(augment(images, torch.Generator()), images, atol=1e-5)


def test_a_crop_enlarges_a_part():
    ramp = torch.linspace(0, 1, 32).expand(200, 1, 32, 32)
    cut = VisionAugment(flip=False, scale=(0.25, 0.25), ratio=(1.0, 1.0))(ramp, torch.Generator())
    width = cut[:, 0, 0, -1] - cut[:, 0, 0, 0]
    assert width.tolist() == pytest.approx([0.5] * 200, abs=0.03)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (24, 48)])
@pytest.mark.parametrize("ratio", [2.0, 0.5])
def test_a_crops_ratio_is_its_width_over_its_height(height, width, ratio):
    """A quarter of the area, in pixels: width w and height w / ratio, so w = sqrt(ratio * area)."""
    area = 0.25 * height * width
    wide, tall = (ratio * area) ** 0.5, (area / ratio) ** 0.5
    rows = torch.arange(float(height))[:, None].expand(100, 1, height, width)
    columns = torch.arange(float(width)).expand(100, 1, height, width)
    augment = VisionAugment(flip=False, scale=(0.25, 0.25), ratio=(ratio, ratio))
    cut = augment(torch.cat([rows, columns], dim=1), torch.Generator().manual_seed(0))
    spans = cut.amax(dim=(2, 3)) - cut.amin(dim=(2, 3))
    # Between the centres of the outermost pixels, a pixel of the crop is less than its side.
    steps = torch.tensor([tall * (1 - 1 / height), wide * (1 - 1 / width)])
    torch.testing.assert_close(spans.quantile(0.5, dim=0), steps, atol=0.5, rtol=0)
    torch.testing.assert_close(cut[:, 0], cut[:, 0, :, :1].expand_as(cut[:, 0]))  # rows stay rows
    torch.testing.assert_close(cut[:, 1], cut[:, 1, :1].expand_as(cut[:, 1]))


def test_a_shift_moves_rows_by_one_draw_and_columns_by_the_other():
    height, width = 9, 13
    rows = torch.arange(float(height))[:, None].expand(40, 1, height, width)
    columns = torch.arange(float(width)).expand(40, 1, height, width)
    moved = VisionAugment(flip=False, shift=2)(torch.cat([rows, columns], dim=1), torch.Generator().manual_seed(4))
    down, right = torch.randint(0, 5, (2, 40), generator=torch.Generator().manual_seed(4)) - 2
    assert torch.equal(moved[:, 0, 4, 6], 4.0 + down)
    assert torch.equal(moved[:, 1, 4, 6], 6.0 + right)
    assert not torch.equal(down, right)


def test_bounds_that_fall_are_refused():
    with pytest.raises(ValidationError, match="Swap the two"):
        VisionAugment(scale=(0.9, 0.1))


@pytest.mark.parametrize(("size", "fields"), [(32, {"shift": 4}), (64, {"shift": 8}), (224, {"scale": (0.08, 1.0)})])
def test_the_usual_augmentation(size, fields):
    assert usual_augment(size, flip=False) == VisionAugment(flip=False, **fields)
