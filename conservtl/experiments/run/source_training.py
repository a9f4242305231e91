"""The source model: from given weights, or trained on the source data and kept in a cache."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from conservtl.adaptation.prepare import adapt
from conservtl.data import Data, Examples
from conservtl.engine import fit
from conservtl.errors import SourceError, SpecError
from conservtl.experiments.run.bundle import extend_model, header_of
from conservtl.experiments.run.setting import Setting, augmentation
from conservtl.source.read import read_source

__all__ = ["SourceModel", "obtain_source"]


@dataclass(frozen=True)
class SourceModel:
    """The source model and how it was come by.

    Args:
        model: in eval mode, on the CPU.
        classes: number of its outputs.
        origin: "given", "trained" or "cached".
        notes: what reading the weights found.
    """

    model: nn.Module
    classes: int
    origin: str
    notes: tuple[str, ...] = ()


def obtain_source(setting: Setting, *, progress: bool = False) -> SourceModel:
    """Load the weights that the spec gives, or else train a source model once and keep it.

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
    classes = len(setting.domains.source_labels)
    model = setting.model(classes)
    path = _cache(setting) / f"{spec.task}-{_key(setting, data)}.safetensors"
    if path.is_file():
        model.load_state_dict(load_file(path))
        return SourceModel(model.eval(), classes, "cached")
    fit(
        adapt(model, model, example=setting.example, layers=spec.layers),
        data,
        training=spec.source.training,
        augment=augmentation(setting.domains.source_augmentation),
        seed=spec.seed,
        progress=progress,
    )
    model = model.cpu().eval()
    _write(model, path)
    return SourceModel(model, classes, "trained")


def _given(setting: Setting, weights: Path) -> SourceModel:
    classes = len(setting.domains.source_labels or setting.domains.labels)
    read = read_source(weights)
    model = setting.model(classes)
    head = setting.head(model)
    found = read.matched(model.state_dict())
    found.check_finite()
    own = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    theirs = {name: tuple(found.tensors[name].shape) for name in own if name in found.tensors}
    if theirs.get(head[0], own[head[0]])[0] != own[head[0]][0]:  # a head's weight has a row for each class
        classes = theirs[head[0]][0]
        model = setting.model(classes)
        own = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    for name, shape in own.items():
        if name not in theirs and not name.endswith("num_batches_tracked"):
            raise SourceError(
                f"source.weights {weights.name!r} has no tensor {name!r}, which model.name={setting.spec.model.name} "
                "needs. Choose the model that the weights were trained with."
            )
        if name in theirs and theirs[name] != shape:
            raise SourceError(
                f"source.weights {weights.name!r}: {name!r} has shape {theirs[name]}, but model.name="
                f"{setting.spec.model.name} needs {shape}. Choose the model that the weights were trained with."
            )
    model.load_state_dict({name: found.tensors[name] for name in theirs}, strict=False)
    if weights.suffix == ".safetensors" and (said := header_of(weights)) is not None:
        extend_model(model, said, strategies=False)
    return SourceModel(model.eval(), classes, "given", found.notes)


def _cache(setting: Setting) -> Path:
    return setting.spec.source.cache or Path.home() / ".cache" / "conservtl"


def _key(setting: Setting, data: Data) -> str:
    """A name for everything that the trained source model depends on."""
    augment: Any = setting.domains.source_augmentation
    said = {
        "model": setting.spec.model.model_dump(mode="json"),
        "training": setting.spec.source.training.model_dump(mode="json"),
        "augmentation": augment.model_dump(mode="json") if augment is not None else None,
        "labels": setting.domains.source_labels,
        "seed": setting.spec.seed,
        "torch": torch.__version__,
    }
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    if isinstance(data, Examples):
        digest.update(data.inputs.contiguous().numpy().tobytes())
        digest.update(data.labels.numpy().tobytes())
    else:
        for i in range(len(data)):  # type: ignore[arg-type]
            inputs, label = data[i]
            digest.update(inputs.contiguous().numpy().tobytes() + bytes([int(label) % 256]))
    return digest.hexdigest()[:24]


def _write(model: nn.Module, path: Path) -> None:
    """Whole or not at all, also when two runs write the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    os.close(handle)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, temporary)
    Path(temporary).replace(path)
