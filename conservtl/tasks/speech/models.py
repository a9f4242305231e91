"""Networks by name: compact keyword networks and those of torchaudio."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import nn

from conservtl.errors import MissingExtraError, SpecError, did_you_mean, hint
from conservtl.spec_model import checked
from conservtl.spec_scalars import Arguments
from conservtl.tasks.own_network import NetworkSection
from conservtl.tasks.speech.compact import TCResNet, TCResNetArgs
from conservtl.tasks.speech.features import SpeechPreprocessing
from conservtl.tasks.speech.torchaudio_adapter import torchaudio_names, wrap

__all__ = ["ModelSpec", "build"]

_BLOCKS = {"tc_resnet8": 1, "tc_resnet14": 2}


class ModelSpec(NetworkSection):
    """A network by name."""

    name: Annotated[str, Field(min_length=1)] = "tc_resnet8"
    """`tc_resnet8`, `tc_resnet14`, or a name in `torchaudio.models` (`Wav2Letter`, `Conformer`,
    `wav2vec2_base`, ...)."""
    args: Arguments = Field(default_factory=dict)
    """Arguments of the network: `width`, `dropout` and `norm` of a TC-ResNet, or those of torchaudio's function."""


def build(model: ModelSpec, preprocessing: SpeechPreprocessing, classes: int) -> nn.Module:
    """Build a network with random weights that maps inputs of ``preprocessing`` to (N, classes) logits.

    Raises:
        SpecError: the name is unknown, the arguments do not fit, or the network does not map these inputs to a
            sequence of vectors.
        MissingExtraError: torchaudio is not installed.
    """
    if (own := model.built(classes)) is not None:
        return own
    if model.name in _BLOCKS:
        return _compact(model, preprocessing, classes)
    try:
        known = torchaudio_names()
    except MissingExtraError:
        if not did_you_mean(model.name, _BLOCKS):
            raise
        known = []
    if model.name not in known:
        raise SpecError(
            f"model.name must be a compact network ({', '.join(_BLOCKS)}) or a name in torchaudio.models; "
            f"received {model.name!r}.{hint(model.name, [*_BLOCKS, *known], count=5)}"
        )
    return wrap(model.name, model.args, preprocessing.features, classes)


def _compact(model: ModelSpec, preprocessing: SpeechPreprocessing, classes: int) -> TCResNet:
    features = preprocessing.features
    if features.kind != "logmel":
        raise SpecError(
            f"data.features.kind must be 'logmel' for {model.name}; received {features.kind!r}. Set it to 'logmel'."
        )
    args = checked(
        TCResNetArgs, model.args, "model.args", f" {model.name} takes {', '.join(TCResNetArgs.model_fields)}."
    )
    return TCResNet(features.n_mels, classes, _BLOCKS[model.name], args)
