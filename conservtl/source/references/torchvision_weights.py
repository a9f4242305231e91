"""torchvision's weights: an entry of an enumeration, or ``torchvision:ResNet18_Weights.DEFAULT``."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from conservtl.errors import SourceError, hint
from conservtl.extras import require
from conservtl.source.downloads import download_published
from conservtl.source.references.reference import Reference

__all__ = ["TorchvisionWeights"]


@dataclass(frozen=True)
class TorchvisionWeights(Reference):
    """Weights that torchvision publishes.

    Args:
        weights: entry of an enumeration, such as ``ResNet18_Weights.IMAGENET1K_V1``.
    """

    weights: Any

    schemes = ("torchvision",)
    bare = re.compile(r"\w+_Weights\.\w+")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Find the entry by its name."""
        name = text.removeprefix("torchvision:")
        models = require("torchvision.models", "vision")
        try:
            return cls(models.get_weight(name))
        except (ValueError, KeyError, AttributeError) as error:
            known = [f"{entry.__name__}.{one}" for entry in _enumerations(models) for one in entry.__members__]
            raise SourceError(
                f"source {text!r} must name an entry of torchvision's weights, such as "
                f"torchvision:ResNet18_Weights.DEFAULT.{hint(name, known, count=3)}"
            ) from error

    @classmethod
    def of(cls, source: object) -> Self | None:
        """Take an entry of an enumeration."""
        models = sys.modules.get("torchvision.models")
        return cls(source) if models is not None and isinstance(source, models.WeightsEnum) else None

    def read(self) -> Path:
        """Return the file, kept where torchvision keeps it."""
        return download_published(self.weights.url, str(self))

    def __str__(self) -> str:
        return f"torchvision:{type(self.weights).__name__}.{self.weights.name}"  # DEFAULT has the name of its entry


def _enumerations(models: Any) -> list[Any]:
    return list(dict.fromkeys(models.get_model_weights(name) for name in models.list_models()))
