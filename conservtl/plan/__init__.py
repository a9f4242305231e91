"""The plan: every decision about a model, readable before anything is trained."""

from conservtl.plan.decision import After, Decision, Extension, FinishContext, Measure, MeasureContext, Search
from conservtl.plan.penalty import Penalty, PenaltyKernel
from conservtl.plan.plan import Plan
from conservtl.plan.row import COLUMNS, Anneal, Choice, Phase, Row
from conservtl.plan.term import Term, View
from conservtl.plan.update import Moving, Step, Update

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
