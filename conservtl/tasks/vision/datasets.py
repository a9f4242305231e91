"""Specs of image data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from conservtl.bounds import NonNegativeInt, Place
from conservtl.data.shots import Shots
from conservtl.spec_scalars import Arguments
from conservtl.tasks.bad_files import FileData, FolderFiles
from conservtl.tasks.classification import ClassData
from conservtl.tasks.vision.augment import VisionAugment, usual_augment
from conservtl.tasks.vision.corruptions import Corruption
from conservtl.tasks.vision.image_settings import ImageSettings

__all__ = ["DIGITS_IMAGES", "DataSpec", "DigitsData", "ImageFolderData", "TorchvisionData"]

DIGITS_IMAGES = ImageSettings(size=16, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
"""The 8 x 8 digits at twice their size: large enough for three stages of convolutions, and fast on a CPU."""

_Digit = Annotated[int, Field(ge=0, le=9)]
_WRITING = frozenset({"EMNIST", "KMNIST", "MNIST", "Omniglot", "QMNIST", "RenderedSST2", "SVHN", "USPS"})


class _Images(ClassData):
    """Fields of all kinds of image data."""

    shots: Shots = 5
    """Labelled target images of each class for adaptation, drawn by the run's seed: a number, ``{up_to: 5}`` or
    ``all``. Without a test part, the last two leave one image of each class that has two to test on."""

    validation: float = Field(default=0.0, ge=0, le=0.9)
    """Share of the shots for validation instead of training; 0 with one shot."""

    augment: VisionAugment | bool = True
    """Augmentation: true for the usual one at the images' size, false for none."""

    proxies: VisionAugment | None = None
    """Changes that turn the shots into images of another kind, on which strategies compare the model with the source;
    null: they compare on the shots as augmented."""

    images: ImageSettings | None = None
    """Size and normalisation; null for those of the model's published weights. The defaults of its fields are those of
    ImageNet, for every model."""

    def augmentation(self, size: int) -> VisionAugment | None:
        """Return the augmentation for inputs of this size (pixels), or None."""
        if isinstance(self.augment, VisionAugment):
            return self.augment
        return usual_augment(size, flip=self._flips()) if self.augment else None

    def _flips(self) -> bool:
        return True


class _Split(_Images):
    """Fields of image data that may have no test part."""

    test_fraction: float = Field(default=0.2, gt=0, lt=1)
    """Share of each class for testing, if the set has no test part."""

    split_seed: NonNegativeInt = 0
    """Draws that test part. It is independent of the run's seed, so that a source model that was trained once is never
    tested on its training images."""


class DigitsData(_Split):
    """scikit-learn's 1,797 handwritten digits: five classes for the source, the other five for the target."""

    kind: Literal["digits"] = "digits"
    """scikit-learn's handwritten digits."""

    source: tuple[_Digit, ...] = Field(default=(0, 1, 2, 3, 4), min_length=2)
    """The source's digits."""

    target: tuple[_Digit, ...] = Field(default=(5, 6, 7, 8, 9), min_length=2)
    """The target's digits; they must differ from the source's."""

    @model_validator(mode="after")
    def _digits_stay_digits(self) -> Self:
        every = [*self.source, *self.target]
        if len(set(every)) < len(every):
            raise ValueError(
                f"data.source and data.target must not share or repeat a digit; received {self.source} and "
                f"{self.target}. List each digit once."
            )
        for name in ("augment", "proxies"):
            change = getattr(self, name)
            if isinstance(change, VisionAugment) and change.flip:
                raise ValueError(
                    f"data.{name}.flip must be false for digits (a mirrored digit is another sign); received true. "
                    f"Set data.{name}.flip to false."
                )
        return self

    def _flips(self) -> bool:
        return False


class _Photographs(_Split):
    """Fields of image data from folders and from torchvision."""

    corruption: Corruption | None = None
    """Corruption of the target's images, in shots and test part. Without another source, the same images without the
    corruption are the source."""


class ImageFolderData(_Photographs, FolderFiles):
    """Images in one folder for each class, below train/ and test/ (or val/), or without these parts."""

    kind: Literal["imagefolder"] = "imagefolder"
    """Images in folders."""

    root: Place
    """The target's folder."""

    source_root: Place | None = None
    """The source's folder, with the same structure; its classes may differ."""


class TorchvisionData(_Photographs, FileData):
    """A classification set of torchvision that is on this disk; nothing is downloaded."""

    kind: Literal["torchvision"] = "torchvision"
    """A data set of torchvision."""

    name: str = Field(min_length=1)
    """Class in torchvision.datasets, such as CIFAR10."""

    root: Place = Path("data")
    """The folder in which torchvision stores it."""

    args: Arguments = Field(default_factory=dict)
    """Further arguments of the class."""

    train_split: str = "train"
    """Name of the part from which the shots are drawn, if the set has the argument `split`."""

    test_split: str = "test"
    """Name of the test part, if the set has the argument `split`."""

    @field_validator("args")
    @classmethod
    def _only_the_sets_own(cls, args: dict[str, Any]) -> dict[str, Any]:
        taken = {"download", "root", "split", "target_transform", "train", "transform", "transforms"}
        for name in sorted(taken & args.keys()):
            raise ValueError(
                f"data.args must not set {name}: nothing is downloaded, and other fields of data decide the rest. "
                f"Remove it."
            )
        return args

    def _flips(self) -> bool:
        return self.name not in _WRITING


DataSpec = Annotated[DigitsData | ImageFolderData | TorchvisionData, Field(discriminator="kind")]
"""Spec of image data, selected by ``kind``."""
