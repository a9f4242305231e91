"""The values of images of any mode, each against numbers computed by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from conservtl.errors import DataError
from conservtl.tasks.vision import ImageSettings, VisionPreprocessing
from conservtl.tasks.vision.datasets import ImageFolderData
from conservtl.tasks.vision.folders import folder_parts

image_module = pytest.importorskip("PIL.Image")
PLAIN = VisionPreprocessing(images=ImageSettings(size=8, crop="squash", mean=(0, 0, 0), std=(1, 1, 1)))
RAMP = np.arange(64).reshape(8, 8)
COLOURS = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)


def read(path):
    (pixels,) = PLAIN.read([path])
    return pixels.permute(1, 2, 0).numpy()


def same(pixels, expected):
    expected = np.broadcast_to(expected[..., None] if expected.ndim == 2 else expected, pixels.shape)
    np.testing.assert_allclose(pixels, expected, atol=1e-6)


@pytest.mark.parametrize("name", ["x.png", "x.tif"])
def test_16_bits_are_divided_by_their_largest_value(tmp_path, name):
    """A ramp of 64 dark values keeps all 64 of them, where 8 bits would leave one."""
    values = (1000 + 3 * RAMP).astype(np.uint16)
    image_module.fromarray(values).save(tmp_path / name)
    pixels = read(tmp_path / name)
    same(pixels, values / 65535)
    assert len(np.unique(pixels)) == 64


def test_16_bits_of_big_endian_and_of_pgm(tmp_path):
    values = (1000 * RAMP).astype(">u2")
    (tmp_path / "x.pgm").write_bytes(b"P5 8 8 65535\n" + values.tobytes())
    same(read(tmp_path / "x.pgm"), values / 65535)
    same(
        PLAIN.pixels(image_module.frombytes("I;16B", (8, 8), values.tobytes())).permute(1, 2, 0).numpy(), values / 65535
    )


def test_an_enlarged_ramp_stays_within_its_values(tmp_path):
    """Bicubic interpolation overshoots at a step; 8-bit images are clipped there, so these are too."""
    values = np.where(RAMP % 8 < 4, 0, 65535).astype(np.uint16)
    image_module.fromarray(values).save(tmp_path / "x.png")
    large = VisionPreprocessing(images=PLAIN.images.model_copy(update={"size": 32, "interpolation": "bicubic"}))
    pixels = large.read([tmp_path / "x.png"])
    assert (pixels.min(), pixels.max()) == (0, 1)
    eight = large.pixels(image_module.fromarray((values // 257).astype(np.uint8)))
    torch.testing.assert_close(pixels[0], eight, atol=1 / 255, rtol=0)


def test_floats_are_in_0_to_1_or_refused(tmp_path):
    values = (RAMP / 63).astype(np.float32)
    image_module.fromarray(values).save(tmp_path / "x.tif")
    same(read(tmp_path / "x.tif"), values)
    for wrong in (values * 255, values - 0.5, np.where(values > 0.5, np.nan, values).astype(np.float32)):
        image_module.fromarray(wrong.astype(np.float32)).save(tmp_path / "x.tif")
        with pytest.raises(DataError, match=r"x\.tif must have values in \[0, 1\].*they go from"):
            read(tmp_path / "x.tif")


def test_32_bit_integers_have_no_known_range(tmp_path):
    image_module.fromarray((RAMP * 1000).astype(np.int32)).save(tmp_path / "x.tif")
    with pytest.raises(DataError, match=r"x\.tif must have values of a known range; it has .* from 0 to 63000"):
        read(tmp_path / "x.tif")


@pytest.mark.parametrize(
    ("orientation", "turned"),
    [
        (1, lambda a: a),
        (2, lambda a: a[:, ::-1]),
        (3, lambda a: a[::-1, ::-1]),
        (4, lambda a: a[::-1]),
        (5, lambda a: a.swapaxes(0, 1)),
        (6, lambda a: np.rot90(a, -1)),  # stored lying on its left side: turn it clockwise
        (7, lambda a: np.rot90(a, 2).swapaxes(0, 1)),
        (8, lambda a: np.rot90(a)),
    ],
)
@pytest.mark.parametrize(("name", "deep"), [("x.png", False), ("x.tif", False), ("x.png", True)])
def test_exif_says_which_way_is_up(tmp_path, orientation, turned, name, deep):
    values = (RAMP * 1000).astype(np.uint16) if deep else COLOURS
    exif = image_module.Exif()
    exif[0x0112] = orientation
    image_module.fromarray(values).save(tmp_path / name, exif=exif)
    same(read(tmp_path / name), turned(values) / (65535 if deep else 255))


def test_an_image_in_memory_is_turned_once(tmp_path):
    exif = image_module.Exif()
    exif[0x0112] = 6
    image_module.fromarray(COLOURS).save(tmp_path / "x.png", exif=exif)
    with image_module.open(tmp_path / "x.png") as image:
        copied = image.convert("RGB")  # as torchvision's sets do
    same(PLAIN.pixels(copied).permute(1, 2, 0).numpy(), np.rot90(COLOURS, -1) / 255)


def test_a_transparency_is_left_out(tmp_path):
    alpha = np.where(RAMP % 8 < 4, 0, 128).astype(np.uint8)
    image_module.fromarray(np.dstack([COLOURS, alpha])).save(tmp_path / "x.png")
    same(read(tmp_path / "x.png"), COLOURS / 255)
    bands = [image_module.fromarray(values.astype(np.uint8)) for values in (RAMP, alpha)]
    image_module.merge("LA", bands).save(tmp_path / "y.png")
    same(read(tmp_path / "y.png"), RAMP / 255)


def test_a_picture_in_the_transparency_alone_is_refused(tmp_path):
    """Black ink on nothing: without its transparency it is black everywhere."""
    alpha = np.where(RAMP % 8 < 4, 0, 255).astype(np.uint8)
    image_module.fromarray(np.dstack([COLOURS * 0, alpha])).save(tmp_path / "x.png")
    with pytest.raises(DataError, match=r"x\.png must have a picture in its colours"):
        read(tmp_path / "x.png")


@pytest.mark.parametrize("options", [{}, {"transparency": 1}])
def test_a_palette_gives_its_colours(tmp_path, options):
    palette = [(250, 10, 30), (5, 120, 60), (0, 0, 255)]
    image = image_module.fromarray((RAMP % 3).astype(np.uint8))
    image.putpalette(sum(palette, ()))
    image.save(tmp_path / "x.png", **options)
    same(read(tmp_path / "x.png"), np.array(palette)[RAMP % 3] / 255)


def test_ink_is_subtracted_from_white(tmp_path):
    ink = np.dstack([COLOURS, RAMP * 4]).astype(np.uint8)
    image_module.frombytes("CMYK", (8, 8), ink.tobytes()).save(tmp_path / "x.tif")
    expected = (255 - COLOURS.astype(float)) * (255 - RAMP[..., None] * 4) / 255**2
    np.testing.assert_allclose(read(tmp_path / "x.tif"), expected, atol=1.5 / 255)


@pytest.mark.parametrize("name", ["x.png", "x.webp", "x.tif"])
def test_several_images_in_a_file_are_refused(tmp_path, name):
    first, second = (image_module.fromarray(values) for values in (COLOURS, 255 - COLOURS))
    first.save(tmp_path / name, save_all=True, append_images=[second])
    with pytest.raises(DataError, match=rf"{name} must have one image; it has 2"):
        read(tmp_path / name)


def test_a_thumbnail_beside_an_image_is_none(tmp_path):
    image = image_module.fromarray(COLOURS)
    image.save(tmp_path / "x.tif", save_all=True, append_images=[image.resize((4, 4))])
    same(read(tmp_path / "x.tif"), COLOURS / 255)


def tree(root, *folders):
    for number, folder in enumerate(folders):
        (root / folder).mkdir(parents=True)
        for i in range(4):
            image_module.fromarray(COLOURS + np.uint8(10 * number + i)).save(root / folder / f"{i}.png")
    return ImageFolderData(root=root, images=ImageSettings(size=8))


def test_hidden_folders_are_skipped_at_every_depth(tmp_path):
    data = tree(tmp_path, "a", "b/deep", "a/.ipynb_checkpoints", "b/deep/.thumbs", "b/__MACOSX", ".git")
    parts = folder_parts(data)
    assert parts.pool.classes == ("a", "b")
    assert len(parts.pool) + len(parts.test) == 8


@pytest.mark.parametrize(
    ("train", "test"), [("Train", "Test"), ("TRAIN", "Val"), ("training", "testing"), ("Training", "valid")]
)
def test_parts_are_known_by_their_usual_names(tmp_path, train, test):
    parts = folder_parts(tree(tmp_path, f"{train}/a", f"{train}/b", f"{test}/a", f"{test}/b"))
    assert parts.pool.classes == ("a", "b")
    assert {name.split("/")[0] for name in parts.pool.names} == {train}
    assert {name.split("/")[0] for name in parts.test.names} == {test}


@pytest.mark.parametrize("folders", [("Train", "cats"), ("testing", "dogs"), ("train", "training", "test")])
def test_a_part_is_never_a_class(tmp_path, folders):
    data = tree(tmp_path, *(f"{folder}/{name}" for folder in folders for name in "ab"))
    with pytest.raises(DataError, match=r"must have (a training and a test part|one training part)"):
        folder_parts(data)


def test_composed_and_decomposed_names_are_one_class(tmp_path):
    data = tree(tmp_path, "train/b\u00e4r", "train/x", "test/ba\u0308r", "test/x")
    assert folder_parts(data).test.classes == ("b\u00e4r", "x")
