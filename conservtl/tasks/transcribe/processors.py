"""The processor that transformers saves beside weights: tokens and features that a spec leaves open, or contradicts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from conservtl.errors import SpecError
from conservtl.source.companions import companions
from conservtl.tasks.transcribe.features import Features
from conservtl.tasks.transcribe.pretrained_tokens import TOKENIZER_FILES, Pretrained

__all__ = ["with_processor"]

_SETTINGS = ("preprocessor_config.json", "processor_config.json")
_COMPARED = ("kind", "sample_rate", "n_mels", "normalise")


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
