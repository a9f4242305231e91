"""The settings of a study of one's own problem, in the form of a spec: studies vary them field by field."""

from __future__ import annotations

from typing import Any, Literal

from conservtl.data.shots import Shots
from conservtl.experiments.spec.spec import Spec
from conservtl.spec_model import FrozenModel
from conservtl.tasks.classification import ClassData

__all__ = ["OwnData", "OwnModel", "OwnSpec"]


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
