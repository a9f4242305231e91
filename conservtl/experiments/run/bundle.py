"""What was adapted, in one folder: saved with its labels and preprocessing, loaded to predict."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from conservtl.adaptation.adaptation import Adaptation
from conservtl.data import Preprocessing
from conservtl.errors import DataError, SourceError, SpecError
from conservtl.experiments.run.setting import Setting, build_model, read_preprocessing
from conservtl.layers import find_layers
from conservtl.methods import as_strategy, extend_all
from conservtl.plan.decision import Extensions
from conservtl.runtime.extending import apply_extensions
from conservtl.tasks import speech, vision

__all__ = ["Adapted", "Prediction", "extend_model", "header_of", "load_adapted", "save_bundle", "save_measured"]

_FILE = "model.safetensors"
_MEASURED = "measured.safetensors"


@dataclass(frozen=True)
class Prediction:
    """What the model says of one file.

    Args:
        file: the file.
        label: the most probable label.
        probability: of that label, in [0, 1].
    """

    file: Path
    label: str
    probability: float


@dataclass(frozen=True)
class Adapted:
    """An adapted model that predicts.

    Args:
        model: in eval mode.
        labels: in the order of the model's outputs.
        preprocessing: how files become inputs.
    """

    model: nn.Module
    labels: tuple[str, ...]
    preprocessing: Preprocessing

    @torch.no_grad()
    def probabilities(self, inputs: Tensor) -> Tensor:
        """(N, labels), each row summing to 1, for inputs as the model takes them."""
        device = next(self.model.parameters()).device
        probabilities: Tensor = self.model(inputs.to(device)).float().softmax(-1)
        return probabilities

    def predict(self, files: str | Path | Sequence[str | Path]) -> list[Prediction]:
        """The most probable label of each file, or of one.

        Raises:
            DataError: a file is missing or cannot be read; the message names it.
        """
        paths = [Path(file) for file in ([files] if isinstance(files, (str, Path)) else files)]
        if missing := [path for path in paths if not path.is_file()]:
            raise DataError(f"{str(missing[0])!r} is not a file. Give paths of files to predict.")
        if not paths:
            return []
        found = self.probabilities(self.preprocessing.read(paths)).cpu()
        best, at = found.max(-1)
        return [
            Prediction(path, self.labels[i], p) for path, i, p in zip(paths, at.tolist(), best.tolist(), strict=True)
        ]


def save_bundle(folder: Path, adaptation: Adaptation, setting: Setting) -> None:
    """Write ``model.safetensors``, with what strategies added merged into the weights where that is exact.

    Its header holds labels and preprocessing, the strategies whose additions cannot be merged, and the plan's
    extensions.
    """
    spec, domains = setting.spec, setting.domains
    model = adaptation.merged()
    header = {
        "task": spec.task,
        "model": spec.model.model_dump(mode="json"),
        "labels": domains.labels,
        "preprocessing": domains.preprocessing.model_dump(mode="json"),
    }
    left = [one for one in adaptation.origin.strategies if not one.merge(model)]
    if left or adaptation.plan.extensions:
        header["extended"] = {
            "strategies": [one.model_dump(mode="json") for one in left],
            "extensions": [one.model_dump(mode="json") for one in adaptation.plan.extensions],
            "example": list(setting.example.shape),
            "layers": spec.layers,
            "modules": sorted({type(one).__module__ for one in (*left, *adaptation.plan.extensions)}),
        }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    temporary = folder / f"{_FILE}.tmp"
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, temporary, {"conservtl": json.dumps(header)})
    temporary.chmod((folder / "spec.yaml").stat().st_mode)  # safetensors leaves it to its owner alone
    temporary.replace(folder / _FILE)


def save_measured(folder: Path, measured: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write ``measured.safetensors``, what was measured before training, as `measurement/name`; nothing where nothing.

    `Adaptation.use_measured` takes it again.
    """
    tensors = {f"{name}/{key}": tensor for name, found in measured.items() for key, tensor in found.items()}
    if tensors:
        own = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
        save_file(own, folder / _MEASURED)
        (folder / _MEASURED).chmod((folder / "spec.yaml").stat().st_mode)


def load_adapted(folder: str | Path) -> Adapted:
    """Give back the model that a run adapted, ready to predict.

    Args:
        folder: what ``conservtl run --out`` wrote, or its ``model.safetensors``.

    Raises:
        SourceError: there is no such model, or it was not written by a run.
    """
    path = Path(folder)
    path = path / _FILE if path.is_dir() else path
    if not path.is_file():
        raise SourceError(f"there is no model in {str(folder)!r}. Give the folder that `conservtl run --out` wrote.")
    try:
        said, tensors = header_of(path), load_file(path)
    except SafetensorError as error:
        raise SourceError(f"{str(path)!r} cannot be read: {error}. Run the adaptation again.") from error
    if said is None:
        raise SourceError(f"{str(path)!r} was not written by a run: it carries no labels. Adapt with `conservtl run`.")
    preprocessing = read_preprocessing(said["task"], said["preprocessing"])
    kind = speech.ModelSpec if said["task"] == "speech" else vision.ModelSpec
    model = build_model(said["task"], kind.model_validate(said["model"]), preprocessing, len(said["labels"]))
    added = extend_model(model, said)
    model.load_state_dict(added | tensors)
    return Adapted(model.eval(), tuple(said["labels"]), preprocessing)


def header_of(path: Path) -> dict[str, Any] | None:
    """Return what a run wrote beside the weights; None for a file that no run wrote."""
    with safe_open(path, "pt") as file:
        header = (file.metadata() or {}).get("conservtl")
    return None if header is None else _upgraded(json.loads(header))


def extend_model(model: nn.Module, header: Mapping[str, Any], *, strategies: bool = True) -> dict[str, Tensor]:
    """Extend a model in place as the run did that wrote a header.

    Args:
        model: built as the header says.
        header: what ``header_of`` returned.
        strategies: whether parameters that strategies added are added too.

    Returns:
        Name of each added parameter -> its tensor at the identity, as after a merge.

    Raises:
        SourceError: a strategy or an extension of a user's own is not imported; the message names its module.
    """
    if (extended := header.get("extended")) is None:
        return {}
    example = None if extended["example"] is None else torch.zeros(extended["example"])
    try:
        chosen = [as_strategy(fields) for fields in extended["strategies"]] if strategies else []
        extensions = TypeAdapter(Extensions).validate_python(extended.get("extensions", ()))
    except (SpecError, ValidationError) as error:
        missing = [name for name in extended.get("modules", ()) if name not in sys.modules]
        if not missing:
            raise
        raise SourceError(
            f"the model was extended by code in {', '.join(missing)}, which is not imported. In Python, import it "
            f"before loading the model; on the command line: --import {' --import '.join(missing)}."
        ) from error
    added, cut = extend_all(model, chosen, example, extended["layers"])
    if extensions:
        apply_extensions(model, extensions, find_layers(model, example, cut))
    tensors = model.state_dict()
    return {name: tensors[name] for name in added}


def _upgraded(header: dict[str, Any]) -> dict[str, Any]:
    """Return a header as this version writes it: an earlier one named each norm that mixes and its share."""
    shares = header.pop("instance_statistics", {})
    if shares:
        names = {share: [name for name, other in shares.items() if other == share] for share in shares.values()}
        extended = header.setdefault("extended", {"strategies": [], "example": None, "layers": None})
        extended["extensions"] = [
            {"kind": "instance_statistics", "by": "NormAdaptation", "share": share, "names": names[share]}
            for share in names
        ]
    return header
