"""A spec: one file that names the data, the source model and the strategies of a run. Read, overridden, validated."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cache, reduce
from operator import or_
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, Self, TypeVar

import yaml
from pydantic import Field, PrivateAttr, TypeAdapter, ValidationError, create_model

from conservtl.engine import Training
from conservtl.errors import SpecError
from conservtl.experiments.spec.fields import with_values
from conservtl.experiments.spec.messages import explanations
from conservtl.experiments.spec.reading import MAX_CHARACTERS, as_written, changeable, fault, read_yaml
from conservtl.experiments.spec.recipes import fill, offer
from conservtl.experiments.spec.sections import CompareSection, SourceSection, SweepSection, TuneSection
from conservtl.methods import AnyStrategy
from conservtl.plugins import import_modules, imported_modules
from conservtl.spec_model import FrozenModel
from conservtl.tasks.base import Task
from conservtl.tasks.registry import task_named, tasks

__all__ = [
    "Held",
    "Spec",
    "dump_spec",
    "load_spec",
    "parse_spec",
    "read_content",
    "schema",
    "spec_class",
    "validated",
    "with_fields",
    "with_variant",
]

Checked = TypeVar("Checked")


class Held(Protocol):
    """A problem held in memory: model, source and data are objects of a program, which no spec names."""

    @property
    def task(self) -> Task:
        """The task that trains and judges its models."""

    def setting(self, spec: Any) -> Any:
        """Return the setting of a run of a spec."""

    def source(self) -> Any:
        """Return the source model."""

    def sent(self, folder: Path) -> AbstractContextManager[Held]:
        """Return the problem for workers that see a folder, which is locked inside the block."""


class Spec(FrozenModel):
    """What ``conservtl run`` takes. Each task has a subclass with its own ``model`` and ``data`` sections."""

    task: str
    """The kind of problem."""
    model: Any
    """The network."""
    data: Any
    """The data of both domains."""
    source: SourceSection = SourceSection()
    """The source model."""
    layers: tuple[str, ...] | None = None
    """Globs of parameter names, input side first, if the layers found are not the ones you mean."""
    fresh: str | tuple[str, ...] = ()
    """Globs of parameters or layers that do not start from the source although they fit; head: the head. Without it, a
    head whose labels overlap the source's starts from the source's rows of these labels, and a head with no label in
    common is fresh."""
    strategies: Annotated[tuple[AnyStrategy, ...], Field(json_schema_extra=offer)] = ()
    """What to conserve and what to change; an empty list is plain fine-tuning. Or ``{recipe: speaker}``,
    ``{recipe: recognizer}`` or ``{recipe: vision}``: the recommended strategies with their training and augmentation;
    fields of those that the spec sets win."""
    training: Training = Training()
    """How to adapt."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Draws the shots, initialises fresh parameters and orders the batches."""
    compare: CompareSection | None = None
    """Settings of ``conservtl compare``; a single run ignores them."""
    sweep: SweepSection | None = None
    """Settings of ``conservtl sweep``; a single run ignores them."""
    tune: TuneSection | None = None
    """Settings of ``conservtl tune``; a single run ignores them."""

    _held: Held | None = PrivateAttr(default=None)

    @property
    def held(self) -> Held | None:
        """The problem held in memory whose settings these are; None: the fields name everything."""
        return self._held

    def holding(self, held: Held) -> Self:
        """Return the spec as the settings of a problem held in memory."""
        copied = self.model_copy()
        copied.__pydantic_private__ = {"_held": held}
        return copied

    @property
    def problem(self) -> Task:
        """The task object of ``task``."""
        return task_named(self.task) if self._held is None else self._held.task

    def __reduce__(self) -> Any:
        """Pickle the fields and the imported modules: the class is made anew in another process."""
        return _restore, (imported_modules(), self.model_dump(mode="json"))


def spec_class(name: str) -> type[Spec]:
    """Return the spec class of a task, composed of its sections."""
    return _spec_class(type(task_named(name)))


def load_spec(path: str | Path, overrides: Sequence[str] = ()) -> Spec:
    """Read a YAML or JSON file, apply ``a.b=c`` overrides, validate.

    An override is a dotted field = value, the value read as YAML. One that switches the ``kind`` (or the ``task``) of a
    section drops the other keys that the file has there.

    Raises:
        SpecError: the file cannot be read, or a field is wrong; the message names it and the fix.
    """
    spec = parse_spec(read_content(path, overrides), str(path))
    alone = spec.model_copy(update={"compare": None})
    for name, fields in ({} if spec.compare is None else spec.compare.variants).items():
        # A target may bring what fields of the data need.
        kept = {field: value for field, value in fields.items() if field.partition(".")[0] != "data"}
        try:
            with_variant(alone, name, kept)
        except SpecError as error:
            raise SpecError(f"{path}:\n  {error}") from None
    return spec


def with_variant(spec: Spec, name: str, fields: Mapping[str, Any]) -> Spec:
    """Return the spec of a comparison's variant."""
    try:
        return with_fields(spec, fields)
    except SpecError as error:
        section = "compare.variants" if spec.held is None else "variants"
        said = str(error).removeprefix("spec:").removeprefix("settings:").strip()
        raise SpecError(f"{section}.{name}: {said}") from None


def read_content(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a file and apply overrides without validation: a search finds its ranges in the result.

    Raises:
        SpecError: the file cannot be read, or an override names no field.
    """
    path = Path(path)
    try:
        with path.open(encoding="utf-8") as file:
            content = read_yaml(file.read(MAX_CHARACTERS + 1))
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"spec {str(path)!r} cannot be read: {error}. Give the path of a YAML or JSON file.") from error
    except yaml.YAMLError as error:
        raise SpecError(f"spec {str(path)!r} is not valid YAML: {fault(error)}") from error
    if not isinstance(content, dict):
        raise SpecError(f"spec {str(path)!r} must hold fields (task, data, ...); received {type(content).__name__}.")
    try:
        return with_values(content, dict(map(_override, overrides)))
    except SpecError as error:
        raise SpecError(f"--set {error}") from error


def parse_spec(content: Mapping[str, Any], where: str = "spec") -> Spec:
    """Validate fields that are already read."""
    return validated(_adapter(), fill(content), where)


def validated(adapter: TypeAdapter[Checked], content: Mapping[str, Any], where: str) -> Checked:
    """Validate fields as a spec's are; ``where`` names them in a message."""
    fields = changeable(content)
    while True:
        try:
            return adapter.validate_python(fields)
        except ValidationError as error:
            if as_written(fields, error.errors()):
                continue
            raise SpecError(f"{where}:\n" + "\n".join(explanations(error.errors(), adapter))) from error


def with_fields(spec: Spec, fields: Mapping[str, Any]) -> Spec:
    """Return the spec with other fields, by dotted name, validated."""
    content = with_values(spec.model_dump(mode="json"), fields)
    if spec.held is None:
        return parse_spec(content)
    return validated(TypeAdapter(type(spec)), content, "settings").holding(spec.held)


def dump_spec(spec: Spec) -> str:
    """Return the spec with every default written out, as YAML."""
    return yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def schema() -> str:
    """Return the JSON schema of a spec, for editors."""
    return json.dumps(_adapter().json_schema(), indent=2)


def _adapter() -> TypeAdapter[Spec]:
    """Return the validator of a spec of any task known so far."""
    return _adapter_of(tuple(type(task) for task in tasks().values()))


@cache
def _adapter_of(classes: tuple[type[Task], ...]) -> TypeAdapter[Spec]:
    union: Any = reduce(or_, map(_spec_class, classes))
    tagged: Any = Annotated[union, Field(discriminator="task")]
    return TypeAdapter(tagged)


@cache
def _spec_class(task: type[Task]) -> type[Spec]:
    sections: dict[str, Any] = {
        "task": (Literal[task.name], Field(description=Spec.model_fields["task"].description)),
        "model": (task.model_section, Field(default=task.model_section(), description="The network.")),
        "data": (task.data_section, Field(description="The data of both domains.")),
    }
    name = f"{task.name.title().replace('_', '').replace('-', '')}Spec"
    return create_model(name, __base__=Spec, __doc__=task.summary, __module__=__name__, **sections)


def _restore(modules: tuple[str, ...], content: dict[str, Any]) -> Spec:
    import_modules(modules)
    return parse_spec(content)


def _override(text: str) -> tuple[str, Any]:
    """Return the dotted name and the value of ``field.field=value``."""
    field, equals, raw = text.partition("=")
    name = field.strip()
    if not equals or not all(name.split(".")):
        raise SpecError(f"{text!r} must have the form field.field=value, such as data.shots=1.")
    try:
        return name, read_yaml(raw) if raw.strip() else ""
    except yaml.YAMLError as error:
        raise SpecError(f"{text!r}: the value is not valid YAML: {fault(error)}") from error
