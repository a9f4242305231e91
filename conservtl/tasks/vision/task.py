"""The task of classifying images under a change of labels or of image quality."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, get_args

from torch import nn

from conservtl.data import Data, Domains, Preprocessing
from conservtl.tasks.classification import Classification
from conservtl.tasks.fingerprint import digest_of_files, digest_of_names
from conservtl.tasks.vision.corruptions import Corruption
from conservtl.tasks.vision.datasets import DataSpec, DigitsData, ImageFolderData, TorchvisionData
from conservtl.tasks.vision.folders import class_names
from conservtl.tasks.vision.loading import load
from conservtl.tasks.vision.models import ModelSpec, build
from conservtl.tasks.vision.preprocessing import VisionPreprocessing

__all__ = ["Vision"]


class Vision(Classification):
    """Images of two domains: other classes, or the same classes at another quality."""

    name: ClassVar[str] = "vision"
    summary: ClassVar[str] = "Image classification under a change of labels or of image quality."
    pipeline: ClassVar[str | None] = "image-classification"
    model_section: ClassVar[Any] = ModelSpec
    data_section: ClassVar[Any] = DataSpec
    preprocessing: ClassVar[Any] = VisionPreprocessing
    example: ClassVar[str] = "image"
    shift: ClassVar[Any] = "input"
    usual_lr: ClassVar[float] = 3e-4

    def load(self, data: Any, model: Any, *, seed: int, source: bool) -> Domains:
        """Read the images of both domains."""
        return load(data, model=model, seed=seed, source=source)

    def build(self, model: Any, preprocessing: Any, outputs: int) -> nn.Module:
        """Return a network with an output for each class."""
        return build(model, preprocessing, outputs)

    def targets(self, data: Any) -> tuple[str, ...]:
        """Return every corruption where the spec has one; else the one target that there is."""
        if _corruption(data) is None:
            return super().targets(data)
        return get_args(Corruption.model_fields["name"].annotation)

    def on_target(self, data: Any, target: str) -> dict[str, Any]:
        """Return the field that names the corruption."""
        return {} if _corruption(data) is None else {"data.corruption.name": target}

    def target_name(self, data: Any, domains: Domains) -> str:
        """Return the corruption, else the digits, else the name of the data."""
        if isinstance(data, DigitsData):
            return f"the digits {', '.join(domains.labels)}"
        if (corruption := _corruption(data)) is not None:
            return f"{corruption.name} (severity {corruption.severity})"
        return str(data.root.name if isinstance(data, ImageFolderData) else data.name)

    def adopt(self, data: Any, preprocessing: Mapping[str, Any]) -> Any:
        """Return the section with the earlier run's image settings if it has none of its own."""
        if data.images is not None:
            return data
        return data.model_copy(update={"images": VisionPreprocessing.model_validate(preprocessing).images})

    def shares_labels(self, data: Any) -> bool:
        """Return whether every class of the source is one of the target's, by name."""
        if isinstance(data, DigitsData):
            return False
        root = getattr(data, "source_root", None)
        return root is None or {*class_names(root, data)} <= {*class_names(data.root, data)}

    def fingerprint(self, data: Any, train: Data, preprocessing: Preprocessing) -> Any:
        """Return names and labels of the source's images, and sizes and times of their files."""
        section = data.model_dump(mode="json", include={"kind", "name", "args", "train_split"})
        files = digest_of_files(_files(data, train))
        return [section, digest_of_names(train), files, preprocessing.model_dump(mode="json")]


def _corruption(data: Any) -> Corruption | None:
    corruption: Corruption | None = getattr(data, "corruption", None)
    return corruption


def _files(data: Any, train: Data) -> Iterable[Path]:
    """Return the files of a folder; of a torchvision set what stands directly in its folder, archives and parts."""
    if isinstance(data, ImageFolderData):
        root = data.source_root or data.root
        return [root / name for name in getattr(train, "names", ())]
    if isinstance(data, TorchvisionData) and data.root.is_dir():
        return sorted(data.root.iterdir())
    return ()
