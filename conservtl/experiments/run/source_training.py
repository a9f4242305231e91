"""The source model: read from given weights, or trained on the source data and cached."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from conservtl.adaptation.prepare import adapt
from conservtl.data import Data
from conservtl.errors import SourceError, SpecError
from conservtl.experiments.run.bundle_header import extend_model, read_header
from conservtl.experiments.run.setting import Setting
from conservtl.files import atomic_path
from conservtl.source.read import read_source

__all__ = ["SourceModel", "obtain_source"]

_FORMAT = 2  # of the cache's keys


@dataclass(frozen=True)
class SourceModel:
    """A source model and its origin.

    Args:
        model: in eval mode, on the CPU.
        outputs: number of its outputs.
        origin: "given", "trained" or "cached".
        notes: remarks on the weights that were read.
    """

    model: nn.Module
    outputs: int
    origin: str
    notes: tuple[str, ...] = ()


def obtain_source(setting: Setting, *, progress: bool = False) -> SourceModel:
    """Load the weights that the spec gives, or else train a source model once and cache it.

    Raises:
        SourceError: the weights do not fit the model.
        SpecError: neither weights nor source data are given.
    """
    spec = setting.spec
    if spec.source.weights is not None:
        return _given(setting, spec.source.weights)
    data = setting.domains.source_train
    if data is None:
        raise SpecError(
            "source: the data names no source to train a model on. Give source.weights, or data with a source part."
        )
    outputs = len(setting.domains.source_labels)
    model = setting.model(outputs)
    path = _cache(setting) / f"{spec.task}-{_key(setting, data)}.safetensors"
    if path.is_file():
        model.load_state_dict(load_file(path))
        return SourceModel(model.eval(), outputs, "cached")
    setting.fit(
        adapt(model, model, example=setting.example, layers=spec.layers),
        data,
        training=spec.source.training,
        augment=setting.task.augmented(setting.domains.source_augmentation),
        progress=progress,
    )
    model = model.cpu().eval()
    with atomic_path(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, temporary)
    return SourceModel(model, outputs, "trained")


def _given(setting: Setting, weights: Path) -> SourceModel:
    outputs = len(setting.domains.source_labels or setting.domains.labels)
    read = read_source(weights)
    model = setting.model(outputs)
    head = setting.head(model)
    found = read.matched(model.state_dict())
    found.check_finite()
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    given = {name: tuple(found.tensors[name].shape) for name in shapes if name in found.tensors}
    if given.get(head[0], shapes[head[0]])[0] != shapes[head[0]][0]:  # a head's weight has a row for each output
        outputs = given[head[0]][0]
        model = setting.model(outputs)
        shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    network = f"model {setting.spec.model.model_dump(mode='json')}"
    for name, shape in shapes.items():
        if name not in given and not name.endswith("num_batches_tracked"):
            raise SourceError(
                f"source.weights {weights.name!r} has no tensor {name!r}, which {network} needs. Choose the model that "
                "the weights were trained with."
            )
        if name in given and given[name] != shape:
            raise SourceError(
                f"source.weights {weights.name!r}: {name!r} has shape {given[name]}, but {network} needs {shape}. "
                "Choose the model that the weights were trained with."
            )
    model.load_state_dict({name: found.tensors[name] for name in given}, strict=False)
    if weights.suffix == ".safetensors" and (header := read_header(weights)) is not None:
        extend_model(model, header, strategies=False)
    return SourceModel(model.eval(), outputs, "given", found.notes)


def _cache(setting: Setting) -> Path:
    return setting.spec.source.cache or Path.home() / ".cache" / "conservtl"


def _key(setting: Setting, data: Data) -> str:
    """A name for everything that the trained source model depends on; reads no example."""
    from conservtl import __version__

    spec, domains = setting.spec, setting.domains
    augmentation = domains.source_augmentation
    parts = {
        "format": _FORMAT,
        "conservtl": __version__,
        "torch": torch.__version__,
        "task": spec.task,
        "model": spec.model.model_dump(mode="json"),
        "training": spec.source.training.model_dump(mode="json"),
        "augmentation": augmentation.model_dump(mode="json") if augmentation is not None else None,
        "labels": domains.source_labels,
        "seed": spec.seed,
        "data": setting.task.fingerprint(spec.data, data, domains.preprocessing),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]
