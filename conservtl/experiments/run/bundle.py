"""An adapted model in one folder: saved with its labels and preprocessing, loaded to predict."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from torch import Tensor, nn

from conservtl.adaptation.adaptation import Adaptation
from conservtl.adaptation.origin import Structure
from conservtl.bounds import as_path
from conservtl.errors import SourceError, SpecError
from conservtl.experiments.run.adapted import Adapted
from conservtl.experiments.run.bundle_header import extend_model, merged_model
from conservtl.experiments.run.own_model import OWN, load_own
from conservtl.experiments.run.setting import Setting
from conservtl.experiments.spec.spec import validated
from conservtl.source.run_header import read_header
from conservtl.storage.tensor_files import load_tensors, save_tensors
from conservtl.tasks.registry import task_named

__all__ = ["Adapted", "load_adapted", "save_bundle", "save_measured"]

_FILE = "model.safetensors"
_MEASURED = "measured.safetensors"


def save_bundle(folder: Path, adaptation: Adaptation, setting: Setting) -> None:
    """Write ``model.safetensors``, with additions of strategies merged into the weights where that is exact.

    Its header holds task, model section, labels and preprocessing, the strategies whose additions cannot be merged,
    and the plan's extensions.
    """
    spec, domains = setting.spec, setting.domains
    header = {
        "task": spec.task,
        "module": type(setting.task).__module__,
        "model": spec.model.model_dump(mode="json"),
        "labels": domains.labels,
        "preprocessing": domains.preprocessing.model_dump(mode="json"),
    }
    structure = Structure(setting.example, spec.layers, getattr(spec.model, "head", None))
    model, extended = merged_model(adaptation, structure)
    save_tensors(model.state_dict(), folder / _FILE, header | extended)


def save_measured(folder: Path, measured: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write the measurements made before training to ``measured.safetensors``, if any, as `measurement/name`.

    `Adaptation.use_measured` takes them again.
    """
    tensors = {f"{name}/{key}": tensor for name, values in measured.items() for key, tensor in values.items()}
    if tensors:
        save_tensors(tensors, folder / _MEASURED)


def load_adapted(
    folder: str | Path,
    model: nn.Module | Callable[[], nn.Module] | None = None,
    *,
    decoding: Mapping[str, Any] | None = None,
) -> Adapted:
    """Load the model that a run adapted or ``save`` wrote, ready to predict.

    Args:
        folder: what ``conservtl run --out`` or ``save`` wrote, or its ``model.safetensors``.
        model: for ``save``, which knows no network of yours: a model of the same structure with any weights, changed
            in place; or a function that returns one. None: the network that the run's spec names.
        decoding: how a recognizer's outputs become a text, as in ``data.decoding`` of a spec. None: as in the run.

    Raises:
        DataError: files of the decoding are missing, or do not fit the model's tokens.
        SourceError: there is no such model, it is damaged, nothing of conservtl wrote it, or it does not fit ``model``.
        SpecError: it is of a task that is not known here; ``model`` is missing, or given for a run's; or ``decoding``
            is wrong, or given for a task that writes no texts.
    """
    path = as_path(folder, "folder")
    path = path / _FILE if path.is_dir() else path
    if not path.is_file():
        raise SourceError(f"there is no model in {str(folder)!r}. Give the folder that `conservtl run --out` wrote.")
    header, tensors = read_header(path), load_tensors(path)
    if header is None:
        raise SourceError(f"{str(path)!r} was not written by a run: it carries no labels. Adapt with `conservtl run`.")
    if header["task"] == OWN:
        if decoding is not None:
            raise _no_texts(header["task"])
        return load_own(path, model, header, tensors)
    if model is not None:
        raise SpecError(
            f"model: {str(path)!r} was written by a run, which knows its network; received "
            f"{type(model).__name__}. Leave model out."
        )
    task = task_named(header["task"], header.get("module"))
    preprocessing: Any = task.preprocessing.model_validate(header["preprocessing"])
    if decoding is not None:
        preprocessing = _decoded_by(decoding, preprocessing, header)
    section = task.model_section.model_validate(header["model"])
    network = task.build(section, preprocessing, len(header["labels"]))
    added = extend_model(network, header)
    network.load_state_dict(added | tensors)
    labels = tuple(header["labels"])
    return Adapted(network.eval(), labels, preprocessing, task.within(labels, preprocessing))


def _decoded_by(decoding: Mapping[str, Any], preprocessing: Any, header: Mapping[str, Any]) -> Any:
    if "decoding" not in type(preprocessing).model_fields:
        raise _no_texts(header["task"])
    content = preprocessing.model_dump(mode="json") | {"decoding": decoding}
    changed = validated(TypeAdapter(type(preprocessing)), content, "predict")
    changed.decoding.check(changed.tokens, header["labels"])
    return changed


def _no_texts(task: str) -> SpecError:
    return SpecError(f"decoding is for tasks that write texts; the model is of the task {task!r}. Leave decoding out.")
