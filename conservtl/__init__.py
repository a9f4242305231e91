"""Domain adaptation with regularized transfer."""

import warnings
from typing import TYPE_CHECKING, Any

from conservtl.adaptation.adaptation import Adaptation
from conservtl.adaptation.prepare import adapt
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
from conservtl.methods import (
    L1SP,
    L2SP,
    LHUC,
    LPFT,
    AutoRGN,
    DiscriminativeLR,
    FeatureConservation,
    FeatureExtraction,
    FisherSP,
    GradualUnfreezing,
    GroupLassoSP,
    InputTransform,
    LayerTransfer,
    Mixout,
    NormAdaptation,
    OutputConservation,
    Projection,
    SelectiveDecay,
    SpectralShrinkage,
    Stage,
    Strategy,
    SurgicalFineTuning,
    WeightInterpolation,
)
from conservtl.plan.plan import Plan
from conservtl.plan.row import Anneal, Phase, Row
from conservtl.source.read import TransferReport
from conservtl.weights.interpolation import interpolate, interpolation_path
from conservtl.weights.recompute_bn import recompute_statistics
from conservtl.weights.soup import soup

if TYPE_CHECKING:
    from conservtl.engine import FitResult, Holdout, Training, best_block, fit
    from conservtl.experiments import Adapted, Prediction, Recipe, Recommendation, load_adapted, recipe, recommend

__version__ = "0.1.0"

_ENGINE = ("FitResult", "Holdout", "Training", "best_block", "fit")
_EXPERIMENTS = ("Adapted", "Prediction", "Recipe", "Recommendation", "load_adapted", "recipe", "recommend")
_RENAMED = {"load": "load_adapted", "path": "interpolation_path"}

__all__ = [
    "L1SP",
    "L2SP",
    "LHUC",
    "LPFT",
    "Adaptation",
    "Adapted",
    "Anneal",
    "AutoRGN",
    "ConservtlError",
    "DataError",
    "DiscriminativeLR",
    "FeatureConservation",
    "FeatureExtraction",
    "FisherSP",
    "FitResult",
    "GradualUnfreezing",
    "GroupLassoSP",
    "Holdout",
    "InputError",
    "InputTransform",
    "Layer",
    "LayerTransfer",
    "MissingExtraError",
    "Mixout",
    "NormAdaptation",
    "OutputConservation",
    "Phase",
    "Plan",
    "PlanError",
    "Prediction",
    "Projection",
    "Recipe",
    "Recommendation",
    "Row",
    "SelectiveDecay",
    "SelectorError",
    "SourceError",
    "SpecError",
    "SpectralShrinkage",
    "Stage",
    "Strategy",
    "SurgicalFineTuning",
    "Training",
    "TrainingDivergedError",
    "TransferReport",
    "WeightInterpolation",
    "adapt",
    "best_block",
    "find_layers",
    "fit",
    "interpolate",
    "interpolation_path",
    "load_adapted",
    "recipe",
    "recommend",
    "recompute_statistics",
    "soup",
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
    if name in _RENAMED:
        new = _RENAMED[name]
        warnings.warn(f"conservtl.{name} is now conservtl.{new}.", DeprecationWarning, stacklevel=2)
        return globals().get(new) or __getattr__(new)
    raise AttributeError(f"module 'conservtl' has no attribute {name!r}")
