"""Which images a run adapts to, as a spec."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from conservtl.bounds import Count, NonNegativeInt
from conservtl.spec_model import FrozenModel
from conservtl.tasks.vision.augment import VisionAugment, usual_augment
from conservtl.tasks.vision.corruptions import Corruption
from conservtl.tasks.vision.image_settings import ImageSettings

__all__ = ["DIGITS_IMAGES", "DataSpec", "DigitsData", "ImageFolderData", "TorchvisionData"]

DIGITS_IMAGES = ImageSettings(size=16, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
"""The 8 x 8 digits doubled: enough for three stages of convolutions, and quick on a CPU."""

_Digit = Annotated[int, Field(ge=0, le=9)]
_WRITING = frozenset({"EMNIST", "KMNIST", "MNIST", "Omniglot", "QMNIST", "RenderedSST2", "SVHN", "USPS"})


class _Images(FrozenModel):
    """What every kind of image data shares."""

    shots: Count = 5
    """Labelled target images a class to adapt with, drawn by the run's seed."""

    validation: float = Field(default=0.0, ge=0, le=0.9)
    """Share of the shots kept to validate with (at one shot a class there is no such part)."""

    augment: VisionAugment | bool = True
    """Random changes while training: true for what is usual at the images' size, false for none."""

    images: ImageSettings | None = None
    """Size and normalisation; null for those of the model's published weights. What is left out of it is
    ImageNet's, whichever the model."""

    def augmentation(self, size: int) -> VisionAugment | None:
        """The random changes for inputs of this size (pixels), or None."""
        if isinstance(self.augment, VisionAugment):
            return self.augment
        return usual_augment(size, flip=self._flips()) if self.augment else None

    def _flips(self) -> bool:
        return True


class _Split(_Images):
    """How images are split where the set comes in one piece."""

    test_fraction: float = Field(default=0.2, gt=0, lt=1)
    """Share of each class kept for testing, where the set has no test part of its own."""

    split_seed: NonNegativeInt = 0
    """Draws that part. Apart from the run's seed, so that a source trained once never saw a test part."""


class DigitsData(_Split):
    """scikit-learn's 1,797 handwritten digits: five classes are the source, the other five the target."""

    kind: Literal["digits"] = "digits"
    """The embedded digits."""

    source: tuple[_Digit, ...] = Field(default=(0, 1, 2, 3, 4), min_length=2)
    """The source's digits."""

    target: tuple[_Digit, ...] = Field(default=(5, 6, 7, 8, 9), min_length=2)
    """The target's digits; none of the source's."""

    @model_validator(mode="after")
    def _digits_stay_digits(self) -> Self:
        every = [*self.source, *self.target]
        if len(set(every)) < len(every):
            raise ValueError(
                f"data.source and data.target must not share or repeat a digit; got {self.source} and "
                f"{self.target}. Name each digit once."
            )
        if isinstance(self.augment, VisionAugment) and self.augment.flip:
            raise ValueError(
                "data.augment.flip must be false for digits (a mirrored digit is another sign); got true. "
                "Set data.augment.flip to false."
            )
        return self

    def _flips(self) -> bool:
        return False


class _Photographs(_Split):
    """What folders and torchvision's sets share."""

    corruption: Corruption | None = None
    """Of the target's images, shots and test alike. The source is then the same images without it,
    unless another source is named."""


class ImageFolderData(_Photographs):
    """Images in one folder a class, below train/ and test/ (or val/), or in one piece."""

    kind: Literal["imagefolder"] = "imagefolder"
    """Folders of images."""

    root: Path
    """The target's folder."""

    source_root: Path | None = None
    """The source's folder, laid out the same way; its classes may differ."""


class TorchvisionData(_Photographs):
    """A classification set of torchvision, already on this disk (nothing is downloaded)."""

    kind: Literal["torchvision"] = "torchvision"
    """A set of torchvision."""

    name: str = Field(min_length=1)
    """Its class in torchvision.datasets, such as CIFAR10."""

    root: Path = Path("data")
    """The folder torchvision keeps it in."""

    args: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of its constructor."""

    train_split: str = "train"
    """Name of the part the shots come from, where the set names its parts."""

    test_split: str = "test"
    """Name of the part to test with, where the set names its parts."""

    @field_validator("args")
    @classmethod
    def _only_the_sets_own(cls, args: dict[str, Any]) -> dict[str, Any]:
        taken = {"download", "root", "split", "target_transform", "train", "transform", "transforms"}
        for name in sorted(taken & args.keys()):
            raise ValueError(
                f"data.args must not set {name}: nothing is downloaded, and the rest follows from the other "
                f"fields of data. Leave it out."
            )
        return args

    def _flips(self) -> bool:
        return self.name not in _WRITING


DataSpec = Annotated[DigitsData | ImageFolderData | TorchvisionData, Field(discriminator="kind")]
"""Any of the three, told apart by ``kind``."""
