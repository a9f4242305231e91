"""Bad images of torchvision's sets: named before training, or left out, counted and listed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import conservtl as ctl
from conservtl.tasks.vision.datasets import TorchvisionData
from conservtl.tasks.vision.image_settings import ImageSettings
from conservtl.tasks.vision.loading import load
from conservtl.tasks.vision.models import ModelSpec

image_module = pytest.importorskip("PIL.Image")
postscript_module = pytest.importorskip("PIL.EpsImagePlugin")
sets = pytest.importorskip("torchvision.datasets")

POSTSCRIPT = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"


def pictures(folder, count):
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for number in range(count):
        noise = torch.randint(256, (16, 16, 3), dtype=torch.uint8, generator=generator)
        image_module.fromarray(noise.numpy()).save(folder / f"{number}.png")


@pytest.fixture
def satellite(tmp_path):
    """EuroSAT's folders, with its labels in an attribute and without parts; images 1, 2 and 6 are bad."""
    for name in ("forest", "river"):
        pictures(tmp_path / "eurosat" / "2750" / name, 5)
    forest, river = (tmp_path / "eurosat" / "2750" / name for name in ("forest", "river"))
    (forest / "1.png").write_bytes((forest / "1.png").read_bytes()[:300])
    (forest / "2.png").write_text("no image")
    (river / "1.png").write_text(POSTSCRIPT)
    return TorchvisionData(
        name="EuroSAT", root=tmp_path, shots="all", test_fraction=0.3, images=ImageSettings(size=8), augment=False
    )


def read(data, **more):
    return load(data, model=ModelSpec(), seed=0, **more)


def test_a_bad_image_is_named(satellite):
    with pytest.raises(ctl.DataError, match=r"EuroSAT: image \d cannot be read: .* data\.on_bad: skip\.$"):
        read(satellite)


def test_bad_images_are_left_out_and_listed(satellite):
    domains = read(satellite.model_copy(update={"on_bad": "skip"}))
    assert list(domains.skipped) == ["all_000001", "all_000002", "all_000006"]
    assert "cannot identify image file" in domains.skipped["all_000002"]
    names = {*domains.shots.names, *domains.target_test.names}
    assert names == {f"all_{number:06d}" for number in (0, 3, 4, 5, 7, 8, 9)}
    for part in (domains.shots, domains.target_test):
        labels = [int(int(name[-6:]) >= 5) for name in part.names]
        assert part.labels.tolist() == labels


def test_pictures_are_those_of_their_names(satellite):
    """An image that is left out does not shift those after it."""
    shots = read(satellite.model_copy(update={"on_bad": "skip", "images": ImageSettings(size=16)})).shots
    for inputs, name in zip(shots.inputs, shots.names, strict=True):
        number = int(name[-6:])
        file = satellite.root / "eurosat" / "2750" / ("river" if number >= 5 else "forest") / f"{number % 5}.png"
        with image_module.open(file) as image:
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
        settings = ImageSettings(size=16)
        expected = (pixels - torch.tensor(settings.mean)[:, None, None]) / torch.tensor(settings.std)[:, None, None]
        assert torch.allclose(inputs, expected, atol=1e-6)


def test_no_other_program_reads_a_set_s_image(satellite, monkeypatch):
    """Pillow would hand PostScript to Ghostscript, whatever the file's suffix."""
    started = []
    monkeypatch.setattr(postscript_module, "gs_binary", "/bin/gs")
    monkeypatch.setattr("subprocess.check_call", lambda *command, **_: started.append(command))
    read(satellite.model_copy(update={"on_bad": "skip"}))
    assert started == []
    assert postscript_module.gs_binary == "/bin/gs"


def test_a_decompression_bomb_is_bad(satellite, monkeypatch):
    monkeypatch.setattr(image_module, "MAX_IMAGE_PIXELS", 200)  # the images have 256
    with pytest.raises(ctl.DataError, match=r"must have at least 2 images.*on_bad: skip, 10 files are skipped"):
        read(satellite.model_copy(update={"on_bad": "skip"}))


@pytest.mark.parametrize("on_bad", ["error", "skip"])
def test_a_set_that_is_opened_for_its_labels(tmp_path, on_bad):
    """Rendered SST2 keeps its labels beside its files."""
    for part, count in (("train", 4), ("test", 2)):
        for name in ("negative", "positive"):
            pictures(tmp_path / "rendered-sst2" / part / name, count)
    (tmp_path / "rendered-sst2" / "train" / "positive" / "3.png").write_text("no image")
    data = TorchvisionData(
        name="RenderedSST2", root=tmp_path, shots="all", images=ImageSettings(size=8), on_bad=on_bad, augment=False
    )
    if on_bad == "error":
        with pytest.raises(ctl.DataError, match="RenderedSST2: image 7 cannot be read: cannot identify image file"):
            read(data)
    else:
        domains = read(data)
        assert list(domains.skipped) == ["train_000007"]
        assert domains.shots.labels.tolist() == [0, 0, 0, 0, 1, 1, 1]
        assert len(domains.target_test) == 4
