"""Domain adaptation with regularized transfer."""

from conservtl.adapt import Adaptation, adapt
from conservtl.engine import FitResult, Holdout, Training, fit
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
from conservtl.plan import Phase, Plan, Row
from conservtl.source import TransferReport
from conservtl.strategies import (
    L2SP,
    DiscriminativeLR,
    FeatureExtraction,
    GradualUnfreezing,
    LayerTransfer,
    Stage,
    Strategy,
)

__version__ = "0.1.0"

__all__ = [
    "L2SP",
    "Adaptation",
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
    "Phase",
    "Plan",
    "PlanError",
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
]
