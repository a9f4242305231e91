"""The plan: every decision about a model, readable before anything is trained."""

from conservtl.plan.decision import (
    After,
    Decision,
    Extension,
    FinishContext,
    Measure,
    MeasureContext,
    Moving,
    Search,
    Step,
    Term,
    Update,
    View,
)
from conservtl.plan.penalty import Penalty, PenaltyKernel
from conservtl.plan.plan import Plan
from conservtl.plan.row import COLUMNS, Anneal, Choice, Phase, Row

__all__ = [
    "COLUMNS",
    "After",
    "Anneal",
    "Choice",
    "Decision",
    "Extension",
    "FinishContext",
    "Measure",
    "MeasureContext",
    "Moving",
    "Penalty",
    "PenaltyKernel",
    "Phase",
    "Plan",
    "Row",
    "Search",
    "Step",
    "Term",
    "Update",
    "View",
]
