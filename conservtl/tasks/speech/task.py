"""The task of recognizing words under a change of speaker."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from conservtl.data import Data, Domains, Preprocessing
from conservtl.tasks.classification import Classification
from conservtl.tasks.fingerprint import digest_of_files, digest_of_names
from conservtl.tasks.named_target import NamedTarget
from conservtl.tasks.speech.corpora import DataSpec, EspeakData, load, speakers
from conservtl.tasks.speech.features import SpeechPreprocessing
from conservtl.tasks.speech.models import ModelSpec, build

__all__ = ["Speech"]


class Speech(NamedTarget, Classification):
    """Recordings of words by several speakers, one of them the target."""

    name: ClassVar[str] = "speech"
    summary: ClassVar[str] = "Word recognition under a change of speaker."
    pipeline: ClassVar[str | None] = "audio-classification"
    model_section: ClassVar[Any] = ModelSpec
    data_section: ClassVar[Any] = DataSpec
    preprocessing: ClassVar[Any] = SpeechPreprocessing
    example: ClassVar[str] = "recording"
    shift: ClassVar[Any] = "speaker"
    usual_lr: ClassVar[float] = 5e-4

    def load(self, data: Any, model: Any, *, seed: int, source: bool) -> Domains:  # noqa: ARG002
        """Read the recordings of both domains."""
        return load(data, seed=seed, source=source)

    def build(self, model: Any, preprocessing: Any, outputs: int) -> nn.Module:
        """Return a network with an output for each word."""
        return build(model, preprocessing, outputs)

    def targets(self, data: Any) -> tuple[str, ...]:
        """Return every speaker found, or the embedded voices."""
        return speakers(data)

    def fingerprint(self, data: Any, train: Data, preprocessing: Preprocessing) -> Any:
        """Return names and labels of the source's recordings, and sizes and times of their files."""
        files = [] if isinstance(data, EspeakData) else [Path(name) for name in getattr(train, "names", ())]
        waves = None if data.source_augment is None else data.source_augment.waves
        files += waves.files if waves else []
        return [data.kind, digest_of_names(train), digest_of_files(files), preprocessing.model_dump(mode="json")]
