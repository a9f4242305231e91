"""Domain adaptation with regularized transfer."""

from typing import TYPE_CHECKING, Any

from conservtl.adapt import Adaptation, adapt
from conservtl.errors import (
    ConservtlError,
    DataError,
    InputError,
    MissingExtraError,
    PlanError,
    SelectorError,
    SourceError,
    SpecError,
    TrainingDivergedError,
)
from conservtl.layers import Layer, find_layers
from conservtl.plan import Anneal, Phase, Plan, Row
from conservtl.source import TransferReport
from conservtl.strategies import (
    L2SP,
    LPFT,
    DiscriminativeLR,
    FeatureExtraction,
    GradualUnfreezing,
    LayerTransfer,
    OutputConservation,
    Stage,
    Strategy,
)

if TYPE_CHECKING:
    from conservtl.engine import FitResult, Holdout, Training, fit
    from conservtl.experiments import Adapted, Prediction, load

__version__ = "0.1.0"

_ENGINE = ("FitResult", "Holdout", "Training", "fit")
_EXPERIMENTS = ("Adapted", "Prediction", "load")

__all__ = [
    "L2SP",
    "LPFT",
    "Adaptation",
    "Adapted",
    "Anneal",
    "ConservtlError",
    "DataError",
    "DiscriminativeLR",
    "FeatureExtraction",
    "FitResult",
    "GradualUnfreezing",
    "Holdout",
    "InputError",
    "Layer",
    "LayerTransfer",
    "MissingExtraError",
    "OutputConservation",
    "Phase",
    "Plan",
    "PlanError",
    "Prediction",
    "Row",
    "SelectorError",
    "SourceError",
    "SpecError",
    "Stage",
    "Strategy",
    "Training",
    "TrainingDivergedError",
    "TransferReport",
    "adapt",
    "find_layers",
    "fit",
    "load",
]


def __dir__() -> list[str]:
    return sorted(__all__)


def __getattr__(name: str) -> Any:
    """Names that a loop of one's own does without: imported when first asked for, so that importing is quick."""
    if name in _ENGINE:
        from conservtl import engine

        return getattr(engine, name)
    if name in _EXPERIMENTS:
        from conservtl import experiments

        return getattr(experiments, name)
    raise AttributeError(f"module 'conservtl' has no attribute {name!r}")
