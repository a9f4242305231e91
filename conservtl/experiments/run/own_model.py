"""A model that was saved from Python: its network is its user's, its preprocessing a declaration."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from conservtl.errors import SourceError, SpecError
from conservtl.experiments.run.adapted import Adapted
from conservtl.experiments.run.bundle_header import extend_model
from conservtl.source.run_header import OWN
from conservtl.tasks.classification import Classification

__all__ = ["OWN", "Declared", "load_own"]


@dataclass(frozen=True)
class Declared:
    """Preprocessing that was declared when the model was saved; it reads no files.

    Args:
        fields: as they were given.
    """

    fields: Mapping[str, Any]

    def read(self, files: Sequence[Path]) -> Any:  # noqa: ARG002 - as its protocol says
        """Raise: how files become inputs is known to the user's code alone.

        Raises:
            SpecError: always.
        """
        raise SpecError(
            "predict reads files as a run's preprocessing says; this model was saved from Python, with the declaration "
            f"{dict(self.fields)}. Make its inputs and call outputs(inputs) or probabilities(inputs)."
        )

    def model_dump(self, *, mode: str = "json") -> dict[str, Any]:  # noqa: ARG002 - as its protocol says
        """Return the fields."""
        return dict(self.fields)


class _OwnTask(Classification):
    """The task of a model that was saved from Python: outputs alone; its data and network are the user's."""

    def load(self, data: Any, model: Any, *, seed: int, source: bool) -> Any:
        raise NotImplementedError

    def build(self, model: Any, preprocessing: Any, outputs: int) -> nn.Module:
        raise NotImplementedError


def load_own(
    path: Path,
    model: nn.Module | Callable[[], nn.Module] | None,
    header: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
) -> Adapted:
    """Load weights that ``save`` wrote into a user's model.

    Raises:
        SpecError: there is no model, or it is none.
        SourceError: the weights do not fit it.
    """
    network = model() if callable(model) and not isinstance(model, nn.Module) else model
    if not isinstance(network, nn.Module):
        raise SpecError(
            f"{str(path)!r} was saved from Python, of a {header['model'].get('class')}, which load_adapted cannot "
            f"build; received {'no model' if network is None else type(network).__name__}. Pass a model of that class, "
            "or a function that returns one: load_adapted(folder, model)."
        )
    added = extend_model(network, header)
    try:
        network.load_state_dict(added | dict(tensors))
    except RuntimeError as error:
        said = " ".join(str(error).split())[:400].rstrip(".")
        raise SourceError(
            f"{str(path)!r} does not fit the model: {said}. Build it as it was when it was saved."
        ) from error
    preprocessing = Declared(header["preprocessing"])
    return Adapted(network.eval(), tuple(header["labels"]), preprocessing, _OwnTask())
