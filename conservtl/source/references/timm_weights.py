"""timm's published weights: ``timm:NAME``, or a model's own ``pretrained_cfg``."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self

from torch import nn

from conservtl.errors import SourceError, hint
from conservtl.extras import require
from conservtl.source.downloads import download_published, one_line
from conservtl.source.references._hub import Repository
from conservtl.source.references.reference import Reference

__all__ = ["TimmWeights"]

_PLACES = ("url", "file", "hf_hub_id", "state_dict")


@dataclass(frozen=True)
class TimmWeights(Reference):
    """Weights that timm publishes. They are loaded into timm's own network, which converts what others named.

    Args:
        name: of the network, with the tag of the weights.
        config: timm's ``PretrainedCfg``.
    """

    name: str
    config: Any = field(compare=False, repr=False)

    schemes = ("timm",)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Find the configuration by the network's name; without a tag, that of the default weights."""
        timm = require("timm", "vision")
        name = text.removeprefix("timm:").removeprefix("timm/")
        architecture, _, tag = name.partition(".")
        if not timm.is_model(architecture):
            raise SourceError(
                f"source {text!r} must name a network of timm.{hint(architecture, timm.list_models(), count=3)}"
            )
        try:
            config = timm.get_pretrained_cfg(name)
        except RuntimeError as error:
            tags = [other.partition(".")[2] for other in timm.list_pretrained(f"{architecture}.*")]
            raise SourceError(
                f"source {text!r}: {architecture} has no weights tagged {tag!r}.{hint(tag, tags, count=3)}"
            ) from error
        return cls._checked(config, text)

    @classmethod
    def of(cls, source: object) -> Self | None:
        """Take a configuration, as timm's class or as the dictionary that a model has."""
        if isinstance(source, Mapping) and "architecture" in source and any(name in source for name in _PLACES):
            kind = require("timm.models", "vision").PretrainedCfg
            known = {one.name for one in fields(kind)}
            source = kind(**{name: value for name, value in source.items() if name in known})
        models = sys.modules.get("timm.models")
        if models is None or not isinstance(source, models.PretrainedCfg):
            return None
        return cls._checked(source, "pretrained_cfg")

    @classmethod
    def _checked(cls, config: Any, text: str) -> Self:
        """Return the reference of a configuration that has weights."""
        if config is None or not any(getattr(config, name) for name in _PLACES):
            raise SourceError(
                f"source {text!r} must name published weights; timm has none for this network. Give a file."
            )
        tag = f".{config.tag}" if config.tag else ""
        return cls(f"{config.architecture}{tag}", config)

    def read(self) -> nn.Module:
        """Return timm's network with the weights in it, on the CPU."""
        self._download()
        timm = require("timm", "vision")
        try:
            network: nn.Module = timm.create_model(
                self.config.architecture, pretrained=True, pretrained_cfg=self.config
            )
        except (OSError, RuntimeError, ValueError) as error:
            raise SourceError(
                f"source {self}: timm cannot load the weights ({one_line(error)}). Give a file of weights instead."
            ) from error
        return network

    def _download(self) -> None:
        """Download the file that timm is going to read, where timm looks for it."""
        config = self.config
        if config.state_dict or config.file:
            return
        if config.hf_hub_id and config.source != "local-dir":
            name, _, revision = config.hf_hub_id.partition("@")
            repository = Repository(name, revision or "main", str(self))
            own = config.hf_hub_filename
            names = [own] if own else ["model.safetensors", "pytorch_model.bin"]
            repository.download([repository.first(names, "Give a file of weights instead.").file])
        elif config.url:
            download_published(config.url, str(self))

    def __str__(self) -> str:
        return f"timm:{self.name}"
