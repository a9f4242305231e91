"""A run's setting: the domains and the models that a spec names."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from conservtl.adaptation.adaptation import Adaptation
from conservtl.adaptation.prepare import adapt
from conservtl.data import Data, Domains, Examples, Preprocessing
from conservtl.errors import SpecError
from conservtl.experiments.spec.spec import SpeechSpec, VisionSpec
from conservtl.layers import find_layers
from conservtl.plan.plan import Plan
from conservtl.source.read import SourceLike
from conservtl.tasks import speech, vision

__all__ = ["Setting", "augmentation", "build_model", "prepare", "read_preprocessing"]


_APART = 2**31  # beyond every seed that a spec can have


@dataclass(frozen=True)
class Setting:
    """What a run starts from.

    Args:
        spec: the run's spec.
        domains: source and target.
        example: a small batch of inputs; finds the order of layers.
        shared: whether source and target have the same labels in the same order.
    """

    spec: SpeechSpec | VisionSpec
    domains: Domains
    example: Tensor
    shared: bool

    def model(self, classes: int, *, target: bool = False) -> nn.Module:
        """A model with this many outputs, initialised by the spec's seed.

        Args:
            classes: number of outputs.
            target: whether it is the one to adapt; drawn otherwise than a source model, whose body was trained under
                the very head it began with.
        """
        with torch.random.fork_rng():
            torch.manual_seed(self.spec.seed + _APART * target)
            return build_model(self.spec.task, self.spec.model, self.domains.preprocessing, classes)

    def adaptation(self, source: SourceLike) -> Adaptation:
        """The spec's strategies on a model for the target, from this source."""
        model = self.model(len(self.domains.labels), target=True)
        spec = self.spec
        fresh = {} if self.shared else dict.fromkeys(self.head(model), "its labels differ from the source's")
        with torch.random.fork_rng():
            torch.manual_seed(spec.seed)
            return adapt(
                model,
                source,
                spec.strategies,
                example=self.example,
                layers=spec.layers,
                fresh=fresh,
            )

    @property
    def target(self) -> str:
        """What a report calls the target."""
        data = self.spec.data
        if isinstance(data, vision.DigitsData):
            return f"the digits {', '.join(self.domains.labels)}"
        if isinstance(data, (vision.ImageFolderData, vision.TorchvisionData)):
            corruption = data.corruption
            name = data.root.name if isinstance(data, vision.ImageFolderData) else data.name
            return f"{corruption.name} (severity {corruption.severity})" if corruption else name
        return data.target

    def head(self, model: nn.Module) -> tuple[str, ...]:
        """Names of the classifier's parameters."""
        return Plan.draw(find_layers(model, self.example, self.spec.layers), {}, {}).head


def prepare(spec: SpeechSpec | VisionSpec) -> Setting:
    """Read the data that a spec names.

    Raises:
        DataError: it is missing, or contradicts the spec.
        SpecError: neither weights nor source data are given.
    """
    source = spec.source.data is not None
    if not source and spec.source.weights is None:
        raise SpecError(
            "source: with data null there is nothing to train a source model on. Give source.weights, "
            "or leave source.data at auto."
        )
    if isinstance(spec, SpeechSpec):
        domains = speech.load(spec.data, seed=spec.seed, source=source)
    else:
        domains = vision.load(spec.data, model=spec.model, seed=spec.seed, source=source)
    if spec.source.labels is not None:
        domains = replace(domains, source_labels=spec.source.labels)
    return Setting(spec, domains, _example(domains.shots), domains.labels == domains.source_labels)


def build_model(task: str, model: Any, preprocessing: Preprocessing, classes: int) -> nn.Module:
    """A model by name, for inputs made by this preprocessing."""
    built: nn.Module = (speech if task == "speech" else vision).build(model, preprocessing, classes)
    return built


def read_preprocessing(task: str, fields: dict[str, Any]) -> Preprocessing:
    """The preprocessing that was saved with a model."""
    kind = speech.SpeechPreprocessing if task == "speech" else vision.VisionPreprocessing
    return kind.model_validate(fields)


def augmentation(augment: Any) -> Any:
    """An augmentation of inputs, as ``fit`` takes it: of (inputs, labels)."""
    if augment is None:
        return None

    def act(batch: Any, generator: torch.Generator) -> Any:
        inputs, labels = batch
        return augment(inputs, generator), labels

    return act


def _example(data: Data) -> Tensor:
    if isinstance(data, Examples):
        return data.inputs[:2]
    return torch.stack([data[i][0] for i in range(2)])
