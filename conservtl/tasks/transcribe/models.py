"""Recognizers by name."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, ValidationError
from torch import nn

from conservtl.errors import SpecError, did_you_mean
from conservtl.spec_scalars import Arguments
from conservtl.tasks.own_network import NetworkSection
from conservtl.tasks.transcribe.conformer import ConformerArgs, ConformerCTC
from conservtl.tasks.transcribe.features import TranscribePreprocessing

__all__ = ["ModelSpec", "build"]

_NAMES = ("conformer",)


class ModelSpec(NetworkSection):
    """A recognizer by name. A network of your own takes (inputs, lengths) and returns (logits, lengths)."""

    name: Annotated[str, Field(min_length=1)] = "conformer"
    """`conformer`: a compact Conformer for CTC."""
    args: Arguments = Field(default_factory=dict)
    """Arguments of the network, such as `width`, `blocks` and `subsampling` of the Conformer."""


def build(model: ModelSpec, preprocessing: TranscribePreprocessing, tokens: int) -> nn.Module:
    """Build a recognizer with random weights.

    Raises:
        SpecError: the name is unknown, or the arguments do not fit.
    """
    if (own := model.built(tokens)) is not None:
        return own
    if model.name not in _NAMES:
        raise SpecError(
            f"model.name must be a recognizer ({', '.join(_NAMES)}); received {model.name!r}."
            f"{did_you_mean(model.name, _NAMES)}"
        )
    features = preprocessing.features
    if features.kind != "logmel":
        raise SpecError(
            f"data.features.kind must be 'logmel' for {model.name}; received {features.kind!r}. Set it to 'logmel'."
        )
    try:
        args = ConformerArgs.model_validate(model.args)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(("model.args", *(str(part) for part in first["loc"])))
        raise SpecError(
            f"{where}: {first['msg'].removeprefix('Value error, ')}; received {first['input']!r}. {model.name} takes "
            f"{', '.join(ConformerArgs.model_fields)}."
        ) from error
    return ConformerCTC(features.n_mels, tokens, args)
