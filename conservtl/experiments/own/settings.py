"""The settings of a study of one's own problem, in the form of a spec: studies vary them field by field."""

from __future__ import annotations

from typing import Literal

from conservtl.data.shots import Shots
from conservtl.experiments.spec.spec import Spec
from conservtl.spec_model import FrozenModel
from conservtl.tasks.classification import ClassData

__all__ = ["OwnData", "OwnModel", "OwnSpec"]


class OwnModel(FrozenModel):
    """The model that a program holds."""

    number: int = 0
    """Number of the problem in this process: runs of different problems share nothing."""
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
