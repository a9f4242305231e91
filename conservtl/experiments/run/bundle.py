"""What was adapted, in one folder: saved with its labels and preprocessing, loaded to predict."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from conservtl.adaptation.adaptation import Adaptation
from conservtl.data import Preprocessing
from conservtl.errors import DataError, SourceError
from conservtl.experiments.run.setting import Setting, build_model, read_preprocessing
from conservtl.methods import as_strategy, extend_all
from conservtl.methods.norm_adaptation.instance_statistics import mix_instances, shares_of
from conservtl.tasks import speech, vision

__all__ = ["Adapted", "Prediction", "header_of", "load", "remix", "save_bundle", "save_measured"]

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

    Labels and preprocessing travel in its header, and so do the strategies whose additions stay and the share of each
    example's own statistics in each norm.
    """
    spec, domains = setting.spec, setting.domains
    model = adaptation.merged()
    header = {
        "task": spec.task,
        "model": spec.model.model_dump(mode="json"),
        "labels": domains.labels,
        "preprocessing": domains.preprocessing.model_dump(mode="json"),
    }
    if stay := [one for one in adaptation.origin.strategies if not one.merge(model)]:
        header["extended"] = {
            "strategies": [one.model_dump(mode="json") for one in stay],
            "example": list(setting.example.shape),
            "layers": spec.layers,
        }
    if mixed := shares_of(model):
        header["instance_statistics"] = mixed
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


def load(folder: str | Path) -> Adapted:
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
    added = _extended(model, said["extended"]) if "extended" in said else {}
    model.load_state_dict(added | tensors)
    remix(model, said)
    return Adapted(model.eval(), tuple(said["labels"]), preprocessing)


def header_of(path: Path) -> dict[str, Any] | None:
    """What a run wrote beside the weights; None in a file that no run wrote."""
    with safe_open(path, "pt") as file:
        header = (file.metadata() or {}).get("conservtl")
    return None if header is None else dict(json.loads(header))


def remix(model: nn.Module, said: Mapping[str, Any]) -> None:
    """Let the norms of a model mix as those of the run did that wrote this header."""
    mix_instances({model.get_submodule(name): share for name, share in said.get("instance_statistics", {}).items()})


def _extended(model: nn.Module, said: Mapping[str, Any]) -> dict[str, Tensor]:
    """Add to a model what was added to it when it was adapted; name -> tensor at the identity, as after a merge."""
    strategies = [as_strategy(fields) for fields in said["strategies"]]
    added, _ = extend_all(model, strategies, torch.zeros(said["example"]), said["layers"])
    own = model.state_dict()
    return {name: own[name] for name in added}
