"""torchaudio's bundles: ``torchaudio:WAV2VEC2_BASE``, the name alone, or the bundle itself."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Self

from torch import nn

from conservtl.compat import bundle_url
from conservtl.errors import SourceError, hint
from conservtl.extras import require
from conservtl.source.downloads import download_published, one_line
from conservtl.source.references.reference import Reference

__all__ = ["TorchaudioBundle"]


@dataclass(frozen=True)
class TorchaudioBundle(Reference):
    """Weights that torchaudio publishes, in its own network.

    Args:
        name: of the bundle in ``torchaudio.pipelines``.
        bundle: the bundle.
    """

    name: str
    bundle: Any = field(compare=False, repr=False)

    schemes = ("torchaudio",)
    bare = re.compile(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)+")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Find the bundle by its name."""
        name = text.removeprefix("torchaudio:")
        pipelines = require("torchaudio.pipelines", "torchaudio")
        known = [one for one in pipelines.__all__ if hasattr(getattr(pipelines, one), "get_model") and one.isupper()]
        if name not in known:
            raise SourceError(f"source {text!r} must name a bundle of torchaudio.{hint(name, known, count=3)}")
        return cls(name, getattr(pipelines, name))

    @classmethod
    def of(cls, source: object) -> Self | None:
        """Take a bundle."""
        if not type(source).__module__.startswith("torchaudio.pipelines") or not hasattr(source, "get_model"):
            return None
        pipelines = require("torchaudio.pipelines", "torchaudio")
        name = next((one for one in pipelines.__all__ if getattr(pipelines, one) is source), type(source).__name__)
        return cls(name, source)

    def read(self) -> nn.Module:
        """Return torchaudio's network with the weights in it."""
        if (url := bundle_url(self.bundle)) is not None:
            download_published(url, str(self))
        try:
            network: nn.Module = self.bundle.get_model()
        except (OSError, RuntimeError, ValueError) as error:
            raise SourceError(
                f"source {self}: torchaudio cannot load the weights ({one_line(error)}). Give a file of weights."
            ) from error
        return network

    def __str__(self) -> str:
        return f"torchaudio:{self.name}"
