"""Data that tests of runs and of studies share."""

import numpy as np
import pytest


@pytest.fixture
def image_folder(tmp_path):
    """A function of labels that returns an image folder: four images of each to train on, two to test on."""
    pil = pytest.importorskip("PIL.Image")
    pytest.importorskip("torchvision")

    def made(labels):
        generator = np.random.default_rng(0)
        for part, count in (("train", 4), ("test", 2)):
            for label in labels:
                folder = tmp_path / "images" / part / label
                folder.mkdir(parents=True)
                for number in range(count):
                    pixels = generator.integers(0, 255, (8, 8, 3), dtype=np.uint8)
                    pil.fromarray(pixels).save(folder / f"{number}.png")
        return str(tmp_path / "images")

    return made
