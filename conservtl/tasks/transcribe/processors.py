"""What transformers saves beside weights: tokens, features and sizes that a spec leaves open, or contradicts."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from conservtl.errors import SpecError
from conservtl.extras import require
from conservtl.source.companions import companions
from conservtl.tasks.transcribe.features import Features
from conservtl.tasks.transcribe.pretrained_tokens import TOKENIZER_FILES, Pretrained
from conservtl.tasks.transcribe.waveform_models import TRANSFORMERS

__all__ = ["with_architecture", "with_processor"]

_SETTINGS = ("preprocessor_config.json", "processor_config.json")
_COMPARED = ("kind", "sample_rate", "n_mels", "normalise")
_CONFIG = "config.json"
_OTHERS = re.compile(
    r"^_|_tokens?(_id)?s?$|dtype|label|^output_(a|hidden_states)|^init|layerdrop|spec_augment|^ctc_"
    r"|^(architectures|problem_type|transformers_version|model_type|vocab_size|return_dict|use_cache|is_encoder_decoder"
    r"|num_mel_bins|input_feat_per_channel|max_source_positions)$"
)
"""Fields of a configuration that are no sizes, or that data, tokens and the spec decide."""
_FREE = re.compile(r"drop|^mask_|layers$")
"""Fields that a spec may change: they act in training alone, or the plan shows what is left out."""


def with_processor(data: Any, weights: Any) -> Any:
    """Return a ``data`` section with the tokenizer and the features of the weights' processor, where it names none.

    Raises:
        SpecError: its features are others than the weights were trained with.
    """
    files = companions(weights, (*TOKENIZER_FILES, *_SETTINGS))
    changed: dict[str, Any] = {}
    if "tokens" not in data.model_fields_set and files.keys() & {*TOKENIZER_FILES}:
        changed["tokens"] = Pretrained(folder=_folder(weights))
    trained = _features(files)
    if trained is not None and "features" not in data.model_fields_set:
        changed["features"] = trained
    elif trained is not None:
        _check(data.features, trained, weights)
    return data.model_copy(update=changed) if changed else data


def with_architecture(model: Any, weights: Any) -> Any:
    """Return a ``model`` section of transformers with the sizes of the weights' configuration, where it names none.

    Raises:
        SpecError: it names others, or another type. Many leave no trace in the weights, such as the number of heads.
    """
    kind = model.name.removeprefix(TRANSFORMERS)
    file = companions(weights, (_CONFIG,)).get(_CONFIG) if model.name.startswith(TRANSFORMERS) else None
    if file is None:
        return model
    configs = require("transformers", "transformers").AutoConfig
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        trained = found.pop("model_type")
        usual, theirs = configs.for_model(trained).to_dict(), configs.for_model(trained, **found).to_dict()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SpecError(f"source.weights: {_CONFIG} beside them must be a model's configuration: {error}.") from error
    if trained != kind:
        raise SpecError(
            f"model.name must be '{TRANSFORMERS}{trained}', as {_CONFIG} beside source.weights says; received "
            f"{model.name!r}. Set it, or give weights of that type."
        )
    sizes = {name: theirs[name] for name in usual if not _OTHERS.search(name)}
    for name, value in model.args.items():
        if name in sizes and value != sizes[name] and not _FREE.search(name):
            raise SpecError(
                f"model.args.{name} must be {sizes[name]!r}, as {_CONFIG} beside source.weights {str(weights)!r} says; "
                f"received {value!r}. Leave it out."
            )
    changed = {name: value for name, value in sizes.items() if value != usual[name]}
    return model.model_copy(update={"args": {**changed, **model.args}})


def _folder(weights: Any) -> str:
    path = Path(weights)
    return str(path.parent if path.is_file() else weights)


def _features(files: dict[str, Path]) -> Features | None:
    """Return the features of a feature extractor's settings; None: there are none, or of a kind that is not known."""
    file = next((files[name] for name in _SETTINGS if name in files), None)
    if file is None:
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        found = found.get("feature_extractor", found)
        kind, rate = found.get("feature_extractor_type"), int(found["sampling_rate"])
        if kind == "WhisperFeatureExtractor":
            return Features(kind="whisper", n_mels=found["feature_size"], sample_rate=rate)
        if kind == "Speech2TextFeatureExtractor":
            switches = ("do_ceptral_normalize", "normalize_means", "normalize_vars")
            scaled = all(found.get(name, True) for name in switches)
            normalise = "bands" if scaled else "none"
            return Features(kind="fbank", n_mels=found["num_mel_bins"], sample_rate=rate, normalise=normalise)
        if kind == "Wav2Vec2FeatureExtractor":
            scaled = found.get("do_normalize", True)
            return Features(kind="waveform", sample_rate=rate, normalise="mean_variance" if scaled else "none")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SpecError(f"source.weights: {file.name} beside them must be settings of features: {error}.") from error
    return None


def _check(features: Features, trained: Features, weights: Any) -> None:
    names = [name for name in _COMPARED if name != "n_mels" or trained.kind != "waveform"]
    for name in names:
        ours, theirs = getattr(features, name), getattr(trained, name)
        if ours != theirs:
            more = " Recordings are resampled." if name == "sample_rate" else ""
            raise SpecError(
                f"data.features.{name} must be {theirs!r}, as source.weights {str(weights)!r} were trained; "
                f"received {ours!r}. Leave data.features out, or set it.{more}"
            )
