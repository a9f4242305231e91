"""Domain adaptation with regularized transfer.

``__init__.pyi`` lists the same names for type checkers; ``python tests/write_stub.py`` writes it.
"""

import importlib
import warnings
from typing import Any

from conservtl.adaptation.adaptation import Adaptation
from conservtl.adaptation.prepare import adapt
from conservtl.errors import (
    ConservtlError,
    DataError,
    InputError,
    MemoryLimitError,
    MissingExtraError,
    OmissionWarning,
    PlanError,
    SelectorError,
    SourceError,
    SpecError,
    TrainingDivergedError,
)
from conservtl.layers import Layer, find_layers
from conservtl.methods import Strategy, builtin_strategies
from conservtl.methods.gradual_unfreezing import Stage
from conservtl.plan.plan import Plan
from conservtl.plan.row import Anneal, Phase, Row
from conservtl.source.itself import itself
from conservtl.source.transfer import TransferReport
from conservtl.weights.interpolation import interpolate, interpolation_path
from conservtl.weights.merge import Merged, merge
from conservtl.weights.recompute_bn import recompute_statistics
from conservtl.weights.soup import soup

__version__ = "0.1.0"

_STRATEGIES = builtin_strategies()
globals().update(_STRATEGIES)
del builtin_strategies

# Imported at first access, so that `import conservtl` is quick.
_LAZY = {
    "Adapted": "conservtl.experiments.run.adapted",
    "Comparison": "conservtl.experiments.results",
    "FitResult": "conservtl.engine.fit_result",
    "Gains": "conservtl.experiments.own.gains",
    "Holdout": "conservtl.engine.evaluation",
    "Prediction": "conservtl.tasks.base",
    "RangeTest": "conservtl.experiments.advice.lr_range_test",
    "Recipe": "conservtl.experiments.spec.recipes",
    "Recommendation": "conservtl.experiments.advice.recommendation",
    "Sweep": "conservtl.experiments.results",
    "Training": "conservtl.engine.training",
    "best_block": "conservtl.engine.trials",
    "compare": "conservtl.experiments.own.studies",
    "evaluate": "conservtl.experiments.own.gains",
    "fit": "conservtl.engine.loop",
    "load_adapted": "conservtl.experiments.run.bundle",
    "lr_find": "conservtl.experiments.advice.lr_range_test",
    "recipe": "conservtl.experiments.spec.recipes",
    "recommend": "conservtl.experiments.advice.recommendation",
    "save": "conservtl.experiments.publishing.save",
    "sweep": "conservtl.experiments.own.studies",
}
_RENAMED = {"load": "load_adapted", "path": "interpolation_path"}

__all__ = [
    "Adaptation",
    "Anneal",
    "ConservtlError",
    "DataError",
    "InputError",
    "Layer",
    "MemoryLimitError",
    "Merged",
    "MissingExtraError",
    "OmissionWarning",
    "Phase",
    "Plan",
    "PlanError",
    "Row",
    "SelectorError",
    "SourceError",
    "SpecError",
    "Stage",
    "Strategy",
    "TrainingDivergedError",
    "TransferReport",
    "adapt",
    "find_layers",
    "interpolate",
    "interpolation_path",
    "itself",
    "merge",
    "recompute_statistics",
    "soup",
]
__all__ += [*_LAZY, *_STRATEGIES]  # noqa: PLE0604 - they are strings
__all__.sort(key=lambda name: (name.upper() != name, name[0].islower(), name))  # constants, classes, functions


def __dir__() -> list[str]:
    return sorted(__all__)


def __getattr__(name: str) -> Any:
    """Import a name at its first access, or return a renamed one with a warning."""
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name in _RENAMED:
        new = _RENAMED[name]
        warnings.warn(f"conservtl.{name} is now conservtl.{new}.", DeprecationWarning, stacklevel=2)
        return globals().get(new) or __getattr__(new)
    raise AttributeError(f"module 'conservtl' has no attribute {name!r}")
