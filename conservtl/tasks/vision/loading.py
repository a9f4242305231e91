"""Loading of the two domains of a run."""

from __future__ import annotations

from conservtl.data import Domains, carve, draw_shots
from conservtl.data.shots import Shots
from conservtl.errors import DataError
from conservtl.tasks.bad_files import explained
from conservtl.tasks.vision.datasets import DIGITS_IMAGES, DataSpec, DigitsData, ImageFolderData
from conservtl.tasks.vision.digits import digits_parts
from conservtl.tasks.vision.folders import folder_parts
from conservtl.tasks.vision.models import ModelSpec, published_settings
from conservtl.tasks.vision.parts import ImagePart, Parts, draw_from_pool, read
from conservtl.tasks.vision.preprocessing import VisionPreprocessing
from conservtl.tasks.vision.torchvision_sets import torchvision_parts

__all__ = ["load", "preprocessing_for"]


def preprocessing_for(data: DataSpec, model: ModelSpec) -> VisionPreprocessing:
    """Return the image settings of the spec, else those of the digits, else those of the model's published weights.

    Raises:
        SpecError: the model's name is unknown.
    """
    if data.images is not None:
        return VisionPreprocessing(images=data.images)
    if isinstance(data, DigitsData) and model.own is None and model.name.startswith("cifar_resnet"):
        return VisionPreprocessing(images=DIGITS_IMAGES)
    return VisionPreprocessing(images=published_settings(model))


def load(data: DataSpec, *, model: ModelSpec, seed: int, source: bool = True) -> Domains:
    """Read the images of a spec and split them into the two domains.

    The shots and their validation part are drawn from the target's training part by ``seed`` and never contain test
    images. A corruption changes the target only. The model's published weights decide size and normalisation if
    ``data.images`` is None.

    Returns:
        The two domains. Without a source, its labels are empty and its parts None.

    Raises:
        DataError: images are missing, unreadable or too few, or the folders have an unknown structure.
        SpecError: the model's name is unknown.
        MissingExtraError: torchvision, timm, Pillow or scikit-learn is needed and not installed.
    """
    preprocessing = preprocessing_for(data, model)
    parts = _parts_of(data, preprocessing)
    with explained(parts.skipped):
        shots, test = _shots_and_test(parts, data.shots, seed)
    train, validation = carve(shots.labels, data.validation, seed)
    source_parts = [parts.source_train, parts.source_test] if source else [None, None]
    source_train, source_test = (None if part is None else read(part, preprocessing) for part in source_parts)
    augmentation = data.augmentation(preprocessing.images.size)
    return Domains(
        labels=parts.pool.classes,
        source_labels=parts.source_labels,
        shots=read(shots.take(train), preprocessing, parts.corruption),
        validation=read(shots.take(validation), preprocessing, parts.corruption) if validation else None,
        target_test=read(test, preprocessing, parts.corruption),
        source_train=source_train,
        source_test=source_test,
        preprocessing=preprocessing,
        augmentation=augmentation,
        source_augmentation=augmentation,
        proxies=data.proxies,
        skipped=parts.skipped,
    )


def _parts_of(data: DataSpec, preprocessing: VisionPreprocessing) -> Parts:
    if isinstance(data, DigitsData):
        return digits_parts(data)
    if isinstance(data, ImageFolderData):
        return folder_parts(data, preprocessing)
    return torchvision_parts(data, preprocessing)


def _shots_and_test(parts: Parts, shots: Shots, seed: int) -> tuple[ImagePart, ImagePart]:
    if parts.test is not None:
        if len(parts.test) == 0:
            raise DataError("data must have images for testing; the test part is empty. Add some.")
        return draw_from_pool(parts.pool, shots, seed), parts.test
    drawn, rest = draw_shots(parts.pool.labels, shots, seed)
    return parts.pool.take(drawn), parts.pool.take(rest)
