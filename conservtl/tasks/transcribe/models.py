"""Recognizers by name."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field
from torch import nn

from conservtl.errors import MissingExtraError, SpecError, did_you_mean, hint
from conservtl.spec_model import FrozenModel, checked
from conservtl.spec_scalars import Arguments
from conservtl.tasks.own_network import NetworkSection
from conservtl.tasks.transcribe.conformer import ConformerArgs, ConformerCTC
from conservtl.tasks.transcribe.features import Features, TranscribePreprocessing
from conservtl.tasks.transcribe.seq2seq_models import SEQ2SEQ, build_seq2seq
from conservtl.tasks.transcribe.torchaudio_conformer import TorchaudioConformer, TorchaudioConformerArgs
from conservtl.tasks.transcribe.waveform_models import (
    TRANSFORMERS,
    build_torchaudio,
    build_transformers,
    bundle_labels,
    bundle_of,
    torchaudio_names,
)

__all__ = ["ModelSpec", "build", "with_alphabet_of"]

_NAMES: dict[str, tuple[type[FrozenModel], Any]] = {
    "conformer": (ConformerArgs, ConformerCTC),
    "torchaudio/conformer": (TorchaudioConformerArgs, TorchaudioConformer),
}
"""Networks on log-mel features: their arguments, and what builds them of mel bands, tokens and arguments."""


class ModelSpec(NetworkSection):
    """A recognizer by name. A network of your own takes (inputs, lengths) and returns (logits, lengths) for CTC."""

    name: Annotated[str, Field(min_length=1)] = "conformer"
    """`conformer`: a compact Conformer for CTC; `torchaudio/conformer`: torchaudio's. From sequence to sequence:
    `transformers/whisper` and `transformers/speech_to_text`, with `data.features.kind` whisper and fbank. On samples: a
    bundle of torchaudio (`WAV2VEC2_ASR_BASE_960H`), a function of `torchaudio.models` (`wav2vec2_base`, `hubert_base`,
    `wavlm_base`, `wav2vec2_model`), or a type of transformers' AutoModelForCTC (`transformers/wav2vec2`,
    `transformers/hubert`, `transformers/wavlm`)."""
    args: Arguments = Field(default_factory=dict)
    """Arguments of the network: `width`, `blocks` and `subsampling` of the Conformer, those of torchaudio's function or
    class, or fields of transformers' configuration."""


def build(model: ModelSpec, preprocessing: TranscribePreprocessing, tokens: int) -> nn.Module:
    """Build a recognizer with random weights.

    Raises:
        SpecError: the name is unknown, or the arguments do not fit.
    """
    if (own := model.built(tokens)) is not None:
        return own
    features = preprocessing.features
    kind = model.name.removeprefix(TRANSFORMERS)
    if model.name.startswith(TRANSFORMERS) and kind in SEQ2SEQ:
        _check_features(model.name, features, SEQ2SEQ[kind])
        return build_seq2seq(kind, model.args, features, preprocessing.tokens, tokens)
    _check_blank(model.name, preprocessing.tokens)
    if model.name.startswith(TRANSFORMERS):
        _check_features(model.name, features, "waveform")
        return build_transformers(model.name, model.args, tokens)
    if model.name not in _NAMES:
        return _of_torchaudio(model, features, tokens)
    _check_features(model.name, features, "logmel")
    takes, make = _NAMES[model.name]
    args = checked(takes, model.args, "model.args", f" {model.name} takes {', '.join(takes.model_fields)}.")
    return make(features.n_mels, tokens, args)  # type: ignore[no-any-return]


def with_alphabet_of(data: Any, model: ModelSpec) -> Any:
    """Return a ``data`` section with the characters of the bundle that the model names, in the order of its outputs.

    Raises:
        SpecError: the section has others.
    """
    labels = bundle_labels(model.name) if model.own is None and data.tokens.kind == "characters" else ""
    if not labels or data.tokens.alphabet == labels:
        return data
    if data.tokens.alphabet is not None:
        raise SpecError(
            f"data.tokens.alphabet must hold the characters of {model.name} in the order of its outputs, {labels!r}; "
            f"received {data.tokens.alphabet!r}. Leave it out; for other characters name the architecture, such as "
            "wav2vec2_base, and list the weights' characters in source.labels."
        )
    return data.model_copy(update={"tokens": data.tokens.model_copy(update={"alphabet": labels})})


def _of_torchaudio(model: ModelSpec, features: Features, tokens: int) -> nn.Module:
    """Build a network of torchaudio, the bundles' with the inputs that their weights expect."""
    try:
        known = torchaudio_names()
    except MissingExtraError:
        if not did_you_mean(model.name, _NAMES):
            raise
        known = []
    if model.name not in known:
        raise SpecError(
            f"model.name must be a recognizer: {', '.join(_NAMES)}, a name in torchaudio.models or a bundle of "
            f"torchaudio, or transformers/TYPE; received {model.name!r}.{hint(model.name, [*_NAMES, *known], count=5)}"
        )
    _check_features(model.name, features, "waveform")
    if (bundle := bundle_of(model.name)) is not None:
        if features.sample_rate != bundle.sample_rate:
            raise SpecError(
                f"data.features.sample_rate must be {bundle.sample_rate:g}, at which {model.name} was trained; "
                f"received {features.sample_rate}. Set it to {bundle.sample_rate:g}; recordings are resampled."
            )
        needed = "mean_variance" if "LV60K" in model.name or model.name.startswith("HUBERT") else "none"
        if features.normalise != needed:
            raise SpecError(
                f"data.features.normalise must be {needed!r}, as {model.name} was trained; received "
                f"{features.normalise!r}. Set it to {needed!r}."
            )
    return build_torchaudio(model.name, model.args, tokens)


def _check_features(name: str, features: Features, kind: str) -> None:
    if features.kind != kind:
        raise SpecError(
            f"data.features.kind must be {kind!r} for {name}; received {features.kind!r}. Set it to {kind!r}."
        )


def _check_blank(name: str, tokens: Any) -> None:
    if tokens.blank is None:
        raise SpecError(
            f"data.tokens: {name} needs a tokenizer of CTC, whose padding is the blank; this one has none. Give the "
            "folder of a CTC model, or data.tokens of kind characters."
        )
