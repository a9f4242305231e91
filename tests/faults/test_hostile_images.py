"""Images from strangers are refused, or skipped with a count and a list; memory stays bounded and nothing runs."""

from __future__ import annotations

import os
import struct
import zlib

import pytest
import torch

import conservtl as ctl
from conservtl.tasks.vision.datasets import ImageFolderData
from conservtl.tasks.vision.image_settings import ImageSettings
from conservtl.tasks.vision.loading import load
from conservtl.tasks.vision.models import ModelSpec
from conservtl.tasks.vision.preprocessing import VisionPreprocessing, open_image

image_module = pytest.importorskip("PIL.Image")

PLAIN = VisionPreprocessing(images=ImageSettings(size=8))
RESIZED = VisionPreprocessing(images=ImageSettings(size=224))


def picture(path, number=0, size=(8, 8), **how):
    image_module.new("RGB", size, (number % 256, 40, 200)).save(path, **how)
    return path


def png(path, width, height, pixels=b""):
    """Write a PNG whose header says a size that its pixels need not have."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(pixels))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b""))
    return path


def cut(path):
    noise = torch.randint(256, (64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    image_module.fromarray(noise.numpy()).save(path)
    path.write_bytes(path.read_bytes()[:3000])
    return path


def animated(path):
    frames = [image_module.new("RGB", (8, 8), (90 * number, 0, 0)) for number in range(3)]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    return path


def postscript(path):
    path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(touched) (w) file\nshowpage\n")
    return path


BAD = {
    "nothing at all": (lambda path: path.write_bytes(b""), r"cannot identify image file"),
    "text": (lambda path: path.write_text("These are words."), r"cannot identify image file"),
    "cut short": (cut, r"reading it raises: image file is truncated"),
    "animated": (animated, r"have one image; it has 3"),
    "a bomb": (lambda path: png(path, 13_000, 13_000), r"exceeds limit of 89478485 pixels"),
    "a larger bomb": (lambda path: png(path, 100_000, 100_000), r"exceeds limit of \d+ pixels"),
    "PostScript": (postscript, r"cannot identify image file"),
}


@pytest.mark.parametrize("name", BAD)
def test_images_that_cannot_be_used_are_named(tmp_path, name):
    make, message = BAD[name]
    make(tmp_path / "a.png")
    with pytest.raises(ctl.DataError, match=rf"^\S*a\.png must .*{message}"):
        open_image(tmp_path / "a.png")


def test_a_message_about_frames_is_said_once(tmp_path):
    with pytest.raises(ctl.DataError) as refused:
        open_image(animated(tmp_path / "a.png"))
    assert str(refused.value).count("a.png") == 1


def test_a_picture_of_one_pixel_by_many_is_refused(tmp_path):
    """Its 300,000 pixels become 224 x 67,200,000 when the shorter side is resized."""
    path = picture(tmp_path / "a.png", size=(1, 300_000))
    with pytest.raises(ctl.DataError, match=r"a\.png must have at most 67,108,864 pixels.*sides are 1 and 300,000"):
        RESIZED.read([path])
    squashed = VisionPreprocessing(images=ImageSettings(size=224, crop="squash"))
    assert squashed.read([path]).shape == (1, 3, 224, 224)
    assert RESIZED.read([picture(tmp_path / "b.png", size=(10, 100))]).shape == (1, 3, 224, 224)


@pytest.mark.parametrize("raised", [KeyError("x"), IndexError("x"), struct.error("x"), MemoryError(), EOFError()])
def test_whatever_a_decoder_raises_is_a_message(tmp_path, monkeypatch, raised):
    def crash(*_, **__):
        raise raised

    path = picture(tmp_path / "a.png")
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", crash)
    with pytest.raises(ctl.DataError, match=r"a\.png must be an image that Pillow can read; reading it raises: "):
        open_image(path)


def test_mutated_images_are_read_or_refused(tmp_path):
    draw = torch.Generator().manual_seed(0)
    ends = set()
    for kind in ("png", "jpeg", "tiff", "webp", "bmp", "gif", "ppm"):
        content = bytearray(picture(tmp_path / f"whole.{kind}", size=(16, 16)).read_bytes())
        for number in range(40):
            changed = bytearray(content)
            for place in torch.randint(len(content), (6,), generator=draw).tolist():
                changed[place] = int(torch.randint(256, (), generator=draw))
            (path := tmp_path / f"{number}.{kind}").write_bytes(changed)
            try:
                ends.add(tuple(PLAIN.read([path]).shape))
            except ctl.DataError:
                ends.add("refused")
    assert ends == {(1, 3, 8, 8), "refused"}


@pytest.fixture
def folder(tmp_path):
    """Four images of each of two classes."""
    root = tmp_path / "images"
    for place, name in enumerate(("cat", "dog")):
        (root / name).mkdir(parents=True)
        for number in range(4):
            picture(root / name / f"{number}.png", 60 * place + number)
    return root


def loaded(root, seed=0, **fields):
    data = ImageFolderData(root=root, images=PLAIN.images, **{"shots": 1, "test_fraction": 0.5} | fields)
    return load(data, model=ModelSpec(name="cifar_resnet20"), seed=seed, source=False)


def test_bad_images_are_refused_unless_the_spec_skips_them(folder):
    (folder / "cat/1.png").write_text("text")
    animated(folder / "dog/2.png")
    with pytest.raises(ctl.DataError, match=r"(1|2)\.png must"):
        loaded(folder, shots="all")
    for seed in range(3):
        with pytest.raises(ctl.DataError, match=r"cat/1\.png must .*; 1 other is bad too\. .* data\.on_bad: skip"):
            loaded(folder, seed)  # whatever is drawn
        domains = loaded(folder, seed, on_bad="skip")
        assert list(domains.skipped) == ["cat/1.png", "dog/2.png"]
        assert domains.skipped["dog/2.png"] == "must have one image; it has 3"
        assert len(domains.shots) == 2
        assert len(domains.target_test) == 4  # of three in each class, half rounded up is 2


def test_bad_images_are_skipped_where_images_are_opened_on_access(folder, monkeypatch):
    monkeypatch.setattr("conservtl.tasks.vision.parts.IN_MEMORY", 0)
    monkeypatch.setitem(load.__globals__["read"].__kwdefaults__, "in_memory", 0)
    (folder / "cat/1.png").write_text("text")
    with pytest.raises(ctl.DataError, match=r"cat/1\.png must"):
        loaded(folder)
    domains = loaded(folder, on_bad="skip", shots="all")
    parts = (domains.shots, domains.target_test)
    assert sum(len(part) for part in parts) == 7
    assert all(bool(part[place][0].isfinite().all()) for part in parts for place in range(len(part)))


def test_too_few_images_are_explained_by_what_was_skipped(folder):
    for number in range(3):
        (folder / f"cat/{number}.png").write_text("text")
    with pytest.raises(ctl.DataError, match=r"at least 2 images .*With data\.on_bad: skip, 3 files are skipped: cat/0"):
        loaded(folder, on_bad="skip")
    (folder / "cat/3.png").write_text("text")
    with pytest.raises(ctl.DataError, match=r"every class must have images; \S*cat has none.*4 files are skipped"):
        loaded(folder, on_bad="skip")


def test_the_source_has_bad_images_too(folder, tmp_path):
    source = tmp_path / "source"
    for name in ("cat", "dog"):
        (source / name).mkdir(parents=True)
        for number in range(4):
            picture(source / name / f"{number}.png", 7 * number)
    (source / "dog/0.png").write_text("text")
    data = ImageFolderData(root=folder, source_root=source, images=PLAIN.images, shots=1, on_bad="skip")
    domains = load(data, model=ModelSpec(name="cifar_resnet20"), seed=0)
    assert list(domains.skipped) == ["source/dog/0.png"]
    assert len(domains.source_train) + len(domains.source_test) == 7


def test_links_stay_in_the_root_unless_asked(folder, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for number in range(4):
        picture(elsewhere / f"{number}.png", 90 + number)
    (folder / "eel").symlink_to(elsewhere)
    (folder / "dog/9.png").symlink_to(elsewhere / "0.png")
    with pytest.raises(ctl.DataError, match=r"dog/9\.png is a link that leads out of .*; 1 other is bad too"):
        loaded(folder)
    skipping = loaded(folder, on_bad="skip")
    assert sorted(skipping.skipped) == ["dog/9.png", "eel"]
    assert skipping.labels == ("cat", "dog")
    following = loaded(folder, follow_links=True)
    assert following.labels == ("cat", "dog", "eel")
    assert not following.skipped


def test_links_within_the_root_are_followed(folder):
    """A set may arrange the files of a store in its root by links."""
    stored = folder / "stored"
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            (stored / part / name).mkdir(parents=True)
            picture(stored / part / name / "0.png", len(part))
            picture(stored / part / name / "1.png", 2 * len(part))
            (folder / part).mkdir(exist_ok=True)
            (folder / part / name).symlink_to(stored / part / name)
    assert len(loaded(folder).target_test) == 4


@pytest.mark.parametrize("follow", [True, False])
def test_links_in_circles_end(folder, follow):
    (folder / "cat/up").symlink_to(folder)
    (folder / "ant").symlink_to(folder / "dog")  # the same images under another label
    (folder / "bat").symlink_to(folder / "bat")
    (folder / "cow").symlink_to("/")  # which holds the root
    with pytest.raises(ctl.DataError, match=r"ant is a link to a folder that is listed already, .*; 3 others"):
        loaded(folder, follow_links=follow)
    domains = loaded(folder, follow_links=follow, on_bad="skip")
    assert domains.labels == ("cat", "dog")
    assert domains.skipped["bat"] == "is a link to nothing"
    assert len(domains.target_test) == 4


def test_a_link_from_the_test_part_to_the_training_part_is_found(folder, tmp_path):
    root = tmp_path / "parted"
    root.mkdir()
    folder.rename(root / "train")
    (root / "test").mkdir()
    for name in ("cat", "dog"):
        (root / "test" / name).symlink_to(root / "train" / name)
    with pytest.raises(ctl.DataError, match=r"test/cat is a link to a folder that is listed already, .*; 1 other is"):
        loaded(root)


def test_special_files_and_names_of_any_script(folder):
    os.mkfifo(folder / "cat/8.png")
    (folder / "cat" / os.fsdecode(b"\xff.png")).touch()
    (folder / "dog").rename(folder / "two\nlines \u202e<b>")
    domains = loaded(folder, on_bad="skip")
    assert domains.skipped == {
        "cat/8.png": "is neither a file nor a folder",
        r"'cat/\udcff.png'": "has a name that is not valid UTF-8",
    }
    assert domains.labels == ("cat", "two\nlines \u202e<b>")
