"""Sections of a spec for questions that take many runs. One run ignores them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from conservtl.bounds import Count, NonNegative, NonNegativeInt, Positive
from conservtl.spec_model import FrozenModel

__all__ = ["BASELINES", "CompareSection", "SweepSection", "TuneSection"]

Baseline = Literal[
    "source as it is",
    "from scratch",
    "linear probe",
    "fine-tuning, low rate",
    "fine-tuning, middle rate",
    "fine-tuning, high rate",
    "fine-tuning, interpolated",
    "joint training",
]
BASELINES: tuple[Baseline, ...] = Baseline.__args__  # type: ignore[attr-defined]
"""What every method is held against."""

Overrides = dict[str, Any]
Seeds = Annotated[int, Field(ge=1, le=1000)]


class _Section(FrozenModel):
    targets: tuple[str, ...] | None = None
    """Speakers, or names of corruptions, each of them the target once. null: every speaker found, every corruption;
    only the spec's own where the data has neither."""
    seeds: Seeds = 3
    """Runs of each, with seeds from the spec's own upward: other shots, other order, another source model."""


class CompareSection(_Section):
    """Variants against baselines over targets, seeds and shots."""

    seeds: Seeds = 5
    """Runs of each, with seeds from the spec's own upward: other shots, other order, another source model."""
    shots: Annotated[tuple[Count, ...], Field(min_length=1)] | None = None
    """Numbers of labelled examples a class; null: the spec's own."""
    variants: dict[str, Overrides] = Field(default_factory=dict)
    """Name -> fields of the spec that differ, by dotted name: {"strong": {"strategies.0.alpha": 30}}. None at all:
    the spec as it is."""
    baselines: tuple[Baseline, ...] = BASELINES
    """Which of them are run."""
    rates: tuple[Positive, Positive, Positive] = (1e-4, 3e-4, 1e-3)
    """Of plain fine-tuning, low, middle and high; each stops early on a part of the shots where there is more than
    one a class."""
    probe_rate: Positive = 1e-2
    """Of the linear probe."""
    scratch_rate: Positive = 1e-3
    """Of training from scratch."""


class SweepSection(_Section):
    """Over the number of layers that are transferred, and over the strength of a conservation method."""

    layers: tuple[NonNegativeInt, ...] | None = None
    """Numbers of layers transferred; null: from none to all but the head."""
    sides: tuple[Literal["input", "output"], ...] = ("input", "output")
    """From which side they are counted."""
    controls: bool = True
    """Whether networks that transfer from themselves are trained too (BnB and BnB+)."""
    strategy: Overrides | None = None
    """The method whose strength is swept, as fields of a strategy; null: the spec's first strategy that has one of the
    fields ``alpha``, ``rho`` or ``weight``, or decoupled L2-SP."""
    strengths: tuple[NonNegative, ...] | None = None
    """Strengths; null: six decades around the method's own."""


class TuneSection(_Section):
    """A search over the fields that are marked with a range."""

    trials: Count = 30
    """Of this process; several processes that share a storage add theirs."""
    objective: Literal["target", "harmonic", "both"] = "harmonic"
    """target accuracy, the harmonic mean of target and source, or both apart (a Pareto front); on validation parts."""
    storage: str | None = None
    """URL of an Optuna storage that processes share; null: a SQLite file in the folder."""
    prune: bool = True
    """Whether trials that fall behind the median are given up (one objective only)."""
    seeds: Seeds = 1
    """Runs of each trial, averaged."""
