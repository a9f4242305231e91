"""From a data spec to the two domains of a run."""

from __future__ import annotations

from conservtl.data import Domains, carve, draw_shots
from conservtl.errors import DataError
from conservtl.tasks.vision.datasets import DIGITS_IMAGES, DataSpec, DigitsData, ImageFolderData
from conservtl.tasks.vision.digits import digits_parts
from conservtl.tasks.vision.folders import folder_parts
from conservtl.tasks.vision.models import ModelSpec, published_settings
from conservtl.tasks.vision.parts import ImagePart, Parts, draw_from_pool, read
from conservtl.tasks.vision.preprocessing import VisionPreprocessing
from conservtl.tasks.vision.torchvision_sets import torchvision_parts

__all__ = ["load", "preprocessing_for"]


def preprocessing_for(data: DataSpec, model: ModelSpec) -> VisionPreprocessing:
    """The settings the spec names, else the digits' own, else those of the model's published weights.

    Raises:
        SpecError: no model of that name; the nearest are listed.
    """
    if data.images is not None:
        return VisionPreprocessing(images=data.images)
    if isinstance(data, DigitsData) and model.name.startswith("cifar_resnet"):
        return VisionPreprocessing(images=DIGITS_IMAGES)
    return VisionPreprocessing(images=published_settings(model))


def load(data: DataSpec, *, model: ModelSpec, seed: int, source: bool = True) -> Domains:
    """Read the images of a run.

    The shots are drawn from the target's training part by ``seed`` and a validation part is carved from
    them; no test image is ever among either. A corruption changes the target alone.

    Args:
        data: which images.
        model: the network they are for; decides on size and normalisation where ``data.images`` does not.
        seed: draws the shots and the validation part.
        source: whether to read the source's images too.

    Returns:
        The two domains. Where the spec names no source, its labels are empty and its parts None.

    Raises:
        DataError: images are missing, unreadable or too few, or laid out in an unknown way.
        SpecError: no model of that name.
        MissingExtraError: torchvision, timm, Pillow or scikit-learn is needed and not installed.
    """
    preprocessing = preprocessing_for(data, model)
    parts = _parts_of(data)
    shots, test = _shots_and_test(parts, data.shots, seed)
    train, held = carve(shots.labels, data.validation, seed)
    clean = [part if source else None for part in (parts.source_train, parts.source_test)]
    source_train, source_test = (None if part is None else read(part, preprocessing) for part in clean)
    augmentation = data.augmentation(preprocessing.images.size)
    return Domains(
        labels=parts.pool.classes,
        source_labels=parts.source_labels,
        shots=read(shots.take(train), preprocessing, parts.corruption),
        validation=read(shots.take(held), preprocessing, parts.corruption) if held else None,
        target_test=read(test, preprocessing, parts.corruption),
        source_train=source_train,
        source_test=source_test,
        preprocessing=preprocessing,
        augmentation=augmentation,
        source_augmentation=augmentation,
    )


def _parts_of(data: DataSpec) -> Parts:
    if isinstance(data, DigitsData):
        return digits_parts(data)
    return folder_parts(data) if isinstance(data, ImageFolderData) else torchvision_parts(data)


def _shots_and_test(parts: Parts, shots: int, seed: int) -> tuple[ImagePart, ImagePart]:
    if parts.test is not None:
        if len(parts.test) == 0:
            raise DataError("data must leave images to test with; the test part is empty. Add some.")
        return draw_from_pool(parts.pool, shots, seed), parts.test
    drawn, rest = draw_shots(parts.pool.labels, shots, seed)
    return parts.pool.take(drawn), parts.pool.take(rest)
