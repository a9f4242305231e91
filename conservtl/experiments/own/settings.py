"""The settings of a study of one's own problem, in the form of a spec, and its arguments as sections of one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar

from pydantic import ValidationError

from conservtl.adaptation.origin import Preset
from conservtl.data.shots import Shots
from conservtl.engine import Training
from conservtl.errors import SpecError
from conservtl.experiments.spec.sections import CompareSection, SweepSection
from conservtl.experiments.spec.spec import Spec
from conservtl.methods import Strategy, as_strategies
from conservtl.spec_model import FrozenModel
from conservtl.tasks.classification import ClassData

__all__ = ["OwnData", "OwnModel", "OwnSpec", "Variant", "fields_of", "section_of"]

_Section = TypeVar("_Section", CompareSection, SweepSection)
Variant = Sequence[Strategy | Mapping[str, Any]] | Preset


class OwnModel(FrozenModel):
    """The model that a program holds."""

    number: int = 0
    """Number of the problem in this process: runs of different problems share nothing."""
    content: str = ""
    """Digest of the problem, which a later process finds its results by; empty: none are kept."""
    head: tuple[str, ...] | None = None
    """Globs of the parameters or modules that are the head."""
    random: bool = False
    """Whether parameters that do not start from the source begin at random values instead of the model's own."""


class OwnData(ClassData):
    """The data that a program holds."""

    target: str = "the target"
    """Name of the target."""
    shots: Shots = "all"
    """Examples of each class to adapt with."""


class OwnSpec(Spec):
    """Settings of a problem held in memory."""

    task: Literal["own"] = "own"
    model: OwnModel = OwnModel()
    data: OwnData = OwnData()

    def __reduce_ex__(self, _: Any) -> Any:
        """Pickle the fields as objects: classes of strategies are imported where they are read."""
        return _restore, (type(self), self.__getstate__())


def _restore(cls: type[OwnSpec], state: dict[Any, Any]) -> OwnSpec:
    made = cls.__new__(cls)
    made.__setstate__(state)
    return made


def section_of(cls: type[_Section], fields: Mapping[str, Any]) -> _Section:
    """Return the settings of a study.

    Raises:
        SpecError: a value is wrong; the message names the argument.
    """
    given = {name: value if name == "controls" else _plain(value) for name, value in fields.items()}
    try:
        return cls.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        name = "numbers" if first["loc"][0] == "layers" else str(first["loc"][0])
        said = first["msg"].removeprefix("Value error, ")
        raise SpecError(f"{name}: {said}; received {first['input']!r:.80}. Give another value.") from error


def _plain(value: Any) -> Any:
    """Return a sequence as a tuple; texts, and True and False in the place of numbers, as what no field takes."""
    if isinstance(value, Iterable) and not isinstance(value, (str, bytes, Mapping)):
        return tuple(map(_number, value))
    return _number(value)


def _number(value: Any) -> Any:
    return repr(value) if isinstance(value, bool) else value


def fields_of(variants: Mapping[str, Variant]) -> dict[str, dict[str, Any]]:
    """Return name -> fields of the settings that differ.

    Raises:
        SpecError: they are no strategies by name.
    """
    if not isinstance(variants, Mapping) or not variants:
        raise SpecError(
            "variants must be strategies by name, such as {'L2-SP': [ctl.L2SP(alpha=0.1)]}; received "
            f"{'none' if isinstance(variants, Mapping) else type(variants).__name__}."
        )
    found: dict[str, dict[str, Any]] = {}
    for name, given in variants.items():
        if not isinstance(name, str) or not name.strip():
            raise SpecError(f"variants: each must have a name, a text that a table shows; received {name!r:.80}.")
        if not isinstance(given, (Sequence, Preset)) or isinstance(given, str):
            raise SpecError(f"variants[{name!r}] must be a list of strategies; received {given!r:.80}. Write [...].")
        strategies = given.strategies if isinstance(given, Preset) else given
        chosen = as_strategies(strategies, f"variants.{name}")
        found[name] = {"strategies": [strategy.model_dump(mode="json") for strategy in chosen]}
        if isinstance(given, Preset) and isinstance(given.training, Training):
            settings = given.training.model_dump(mode="json", exclude_unset=True)
            found[name] |= {f"training.{field}": value for field, value in settings.items()}
    return found
