"""A network that code of the user's own builds, named in a spec and run only if its package is imported by hand."""

from __future__ import annotations

import hashlib
import inspect
import sys
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, SerializerFunctionWrapHandler, ValidationInfo, field_validator, model_serializer
from torch import nn

from conservtl.errors import SpecError
from conservtl.plugins import IMPORTABLE, named_callable
from conservtl.spec_model import FrozenModel
from conservtl.spec_scalars import Arguments

__all__ = ["NetworkSection"]


class NetworkSection(FrozenModel):
    """Base of a ``model`` section: a network by name, or by a function that builds it."""

    own: Annotated[str, Field(pattern=IMPORTABLE, examples=["package.module:build"])] | None = Field(
        default=None, alias="import"
    )
    """A function of your own instead of ``name``, as ``package.module:build``. It is called with the number of outputs
    and ``args`` by keyword, and returns a module. Nothing is imported unless ``--import package`` is on the command
    line."""
    args: Arguments = Field(default_factory=dict)
    """Further arguments of the network's constructor."""
    head: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Globs of the parameters or modules that are the head. null: the model is asked, else the last weight used."""

    @field_validator("name", check_fields=False)
    @classmethod
    def _one_network(cls, name: str, info: ValidationInfo) -> str:
        if info.data.get("own") is not None and name != cls.model_fields["name"].default:
            raise ValueError(f"there is model.import already, and a model has one network; received {name}")
        return name

    @model_serializer(mode="wrap")
    def _as_written(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Write the network under the one name that it has."""
        fields: dict[str, Any] = serialise(self)
        rest = {key: value for key, value in fields.items() if key not in ("own", "import", "name")}
        return ({"name": fields["name"]} if self.own is None else {"import": self.own}) | rest

    def digest(self) -> str | None:
        """Return a digest of the file of the function that ``import`` names, imported before; None if it names none."""
        module = None if self.own is None else sys.modules.get(self.own.partition(":")[0])
        file = getattr(module, "__file__", None)
        return None if file is None else hashlib.sha256(Path(file).read_bytes()).hexdigest()

    def built(self, outputs: int) -> nn.Module | None:
        """Return the network that ``import`` names, with so many outputs; None if it names none.

        Raises:
            SpecError: its package was not imported by hand, or the function is missing, does not take the arguments or
                returns no module.
        """
        if self.own is None:
            return None
        build = named_callable(self.own, "model.import")
        try:
            inspect.signature(build).bind(outputs, **self.args)
        except TypeError as error:
            raise SpecError(
                f"model.import {self.own!r} must take the number of outputs and model.args by keyword "
                f"({', '.join(self.args) or 'none'}): {error}."
            ) from error
        network = build(outputs, **self.args)
        if not isinstance(network, nn.Module):
            raise SpecError(f"model.import {self.own!r} must return a torch.nn.Module; it returns {network!r:.80}.")
        return network
