"""A spec: one file that says what is adapted to what, and how. Read, overridden, validated."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from conservtl.engine import Training
from conservtl.errors import SpecError, hint, wrong_tag
from conservtl.experiments.spec.recipes import fill, offer
from conservtl.experiments.spec.study_sections import CompareSection, SweepSection, TuneSection
from conservtl.methods import AnyStrategy
from conservtl.tasks import speech, vision

__all__ = ["SourceSection", "Spec", "SpeechSpec", "VisionSpec", "dump_spec", "load_spec", "read_content", "schema"]


class SourceSection(BaseModel):
    """Where the source model comes from."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    weights: Path | None = None
    """File of source weights. None: a source model is trained on the source data, and cached."""
    data: Literal["auto"] | None = "auto"
    """auto: the source part of ``data`` (other speakers, uncorrupted images, other classes). null: the
    source is without data; what is kept is then measured on the source model's own outputs."""
    labels: tuple[str, ...] | None = None
    """The labels of the source model's outputs, in order, where they cannot be read off the source data.
    Where they are the target's, in the same order, the source's head serves the target too."""
    training: Training = Training(epochs=30, lr=1e-3, schedule="one_cycle", evaluate_every=1000)
    """How a source model is trained where no weights are given."""
    cache: Path | None = None
    """Folder for trained source models, keyed by content. None: ``.cache/conservtl`` in the home folder."""


class _Common(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    source: SourceSection = SourceSection()
    """The source model."""
    layers: tuple[str, ...] | None = None
    """Globs of parameter names, input side first, where the layers found are not the ones you mean."""
    strategies: Annotated[tuple[AnyStrategy, ...], Field(json_schema_extra=offer)] = ()
    """What to conserve and what to change; none at all is plain fine-tuning. Or ``{recipe: speaker}`` or
    ``{recipe: vision}``: what conservtl does when told nothing more, with the training and the augmentation that go
    with it; fields of those that the spec has win."""
    training: Training = Training()
    """How to adapt."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Draws the shots, initialises what is fresh and orders the batches."""
    compare: CompareSection | None = None
    """What ``conservtl compare`` runs; one run ignores it."""
    sweep: SweepSection | None = None
    """What ``conservtl sweep`` runs; one run ignores it."""
    tune: TuneSection | None = None
    """What ``conservtl tune`` searches; one run ignores it."""


class SpeechSpec(_Common):
    """Word recognition under a change of speaker."""

    task: Literal["speech"]
    model: speech.ModelSpec = speech.ModelSpec()
    """The network."""
    data: speech.DataSpec
    """The recordings."""


class VisionSpec(_Common):
    """Image classification under a change of labels or of image quality."""

    task: Literal["vision"]
    model: vision.ModelSpec = vision.ModelSpec()
    """The network."""
    data: vision.DataSpec
    """The images."""


Spec = Annotated[SpeechSpec | VisionSpec, Field(discriminator="task")]
"""What ``conservtl run`` takes."""

_TASKS = ("speech", "vision")
_ADAPTER: TypeAdapter[SpeechSpec | VisionSpec] = TypeAdapter(Spec)


def load_spec(path: str | Path, overrides: Sequence[str] = ()) -> SpeechSpec | VisionSpec:
    """Read a YAML or JSON file, apply ``a.b=c`` overrides, validate.

    Args:
        path: the file.
        overrides: dotted field = value, the value read as YAML. One that switches the ``kind`` (or the
            ``task``) of a section drops the other keys that the file has there.

    Raises:
        SpecError: the file cannot be read, or a field is wrong; the message names it and the fix.
    """
    return parse_spec(read_content(path, overrides), str(path))


def read_content(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The same, not validated: what a search finds its ranges in."""
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"spec {str(path)!r} cannot be read: {error}. Give the path of a YAML or JSON file.") from error
    except yaml.YAMLError as error:
        raise SpecError(f"spec {str(path)!r} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise SpecError(f"spec {str(path)!r} must hold fields (task, data, ...); received {type(content).__name__}.")
    for override in _switches_first(overrides):
        _override(content, override)
    return content


def parse_spec(content: Mapping[str, Any], where: str = "spec") -> SpeechSpec | VisionSpec:
    """Validate fields that are already read.

    Raises:
        SpecError: a field is wrong.
    """
    content = fill(content)
    try:
        return _ADAPTER.validate_python(content)
    except ValidationError as error:
        raise SpecError(f"{where}:\n" + "\n".join(f"  {_explain(e)}" for e in error.errors())) from error


def dump_spec(spec: SpeechSpec | VisionSpec) -> str:
    """The spec with every default written out, as YAML."""
    return yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def schema() -> str:
    """JSON schema of a spec, for editors."""
    return json.dumps(_ADAPTER.json_schema(), indent=2)


def _switches_first(overrides: Iterable[str]) -> list[str]:
    return sorted(overrides, key=lambda text: text.partition("=")[0].rpartition(".")[2] not in ("kind", "task"))


def _override(content: dict[str, Any], text: str) -> None:
    field, equals, raw = text.partition("=")
    keys = field.strip().split(".")
    if not equals or not all(keys):
        raise SpecError(f"--set {text!r} must have the form field.field=value, such as data.shots=1.")
    try:
        value = yaml.safe_load(raw) if raw.strip() else ""
    except yaml.YAMLError as error:
        raise SpecError(f"--set {text!r}: the value is not valid YAML: {error}") from error
    at: Any = content
    for key in keys[:-1]:
        at = _step(at, key, text)
    last = keys[-1]
    if isinstance(at, list):
        at[_position(at, last, text)] = value
        return
    if last in ("kind", "task") and at.get(last) not in (None, value):
        for other in [key for key in at if last == "kind" or key in ("data", "model")]:
            del at[other]
    at[last] = value


def _step(at: Any, key: str, text: str) -> Any:
    if isinstance(at, list):
        return at[_position(at, key, text)]
    if at.get(key) is None:
        at[key] = {}
    if not isinstance(at[key], (dict, list)):
        raise SpecError(f"--set {text!r}: {key!r} holds {at[key]!r}, which has no fields below it.")
    return at[key]


def _position(at: list[Any], key: str, text: str) -> int:
    if not key.isdigit() or int(key) >= len(at):
        raise SpecError(f"--set {text!r}: {key!r} must be a position in a list of {len(at)}, counted from 0.")
    return int(key)


def _explain(error: Any) -> str:
    """One line: field, rule, value received, fix."""
    kinds = _kinds()
    place = [str(part) for part in error["loc"]]
    shown = [part for i, part in enumerate(place) if part not in (*_TASKS, *kinds) or i == len(place) - 1]
    field = ".".join(shown) or "spec"
    received = error.get("input")
    if error["type"] == "extra_forbidden":
        return f"{field}: there is no such field.{hint(shown[-1], _siblings(place[:-1]))}"
    if error["type"] == "union_tag_invalid":
        return f"{field}: {wrong_tag(error)}"
    message = error["msg"].replace("valid tuple", "list")
    if error["type"] in ("model_type", "model_attributes_type", "dict_type"):
        message = f"must hold fields of its own, such as {field}.{(_siblings(place) or ['kind'])[0]}"
    short = "" if isinstance(received, (dict, list)) or error["type"] == "missing" else f"; received {received!r}"
    return f"{field}: {message}{short}"


def _siblings(place: Sequence[str]) -> list[str]:
    """The fields of the section at a place: of the kind that stands there, or of what a field refers to."""
    definitions = _definitions()
    last = next((part for part in reversed(place) if not part.isdigit()), "")
    for definition in definitions.values():
        fields = definition.get("properties", {})
        tags = {fields.get(tag, {}).get("const") for tag in ("kind", "task")}
        if last in tags - {None}:
            return [name for name in fields if name != "kind"]
    for definition in definitions.values():
        reference = definition.get("properties", {}).get(last, {}).get("$ref", "").rpartition("/")[2]
        if reference:
            return list(definitions[reference].get("properties", {}))
    return []


def _definitions() -> dict[str, Any]:
    found: dict[str, Any] = _ADAPTER.json_schema().get("$defs", {})
    return found


def _kinds() -> set[str]:
    """Tags of unions, which stand in the places of errors but not in a spec."""
    return {
        str(fields["kind"]["const"])
        for fields in (definition.get("properties", {}) for definition in _definitions().values())
        if "const" in fields.get("kind", {})
    }
