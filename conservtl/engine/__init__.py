"""The training loop: batches, device and precision, selection, checkpoints."""

from __future__ import annotations

from conservtl.engine.criterion import Criterion, harmonic_mean, score
from conservtl.engine.evaluation import Functions, Holdout, evaluate
from conservtl.engine.fit_result import FitResult
from conservtl.engine.loop import fit
from conservtl.engine.schedule import schedule_factor
from conservtl.engine.training import Training
from conservtl.engine.trials import best_block
from conservtl.functions import accuracy, cross_entropy, forward

__all__ = [
    "Criterion",
    "FitResult",
    "Functions",
    "Holdout",
    "Training",
    "accuracy",
    "best_block",
    "cross_entropy",
    "evaluate",
    "fit",
    "forward",
    "harmonic_mean",
    "schedule_factor",
    "score",
]
