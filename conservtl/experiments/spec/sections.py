"""Sections of a spec: the origin of the source model; comparisons, sweeps and searches, which a single run ignores."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, Field

from conservtl.bounds import Count, NonNegative, NonNegativeInt, Place, Positive, check_names
from conservtl.data.shots import Shots
from conservtl.engine import Training
from conservtl.source.references import is_name, reference_of
from conservtl.spec_model import FrozenModel

__all__ = ["BASELINES", "CompareSection", "SourceSection", "SweepSection", "TuneSection"]


def _path_or_name(value: Any) -> Any:
    return check_names(Path(value)) if isinstance(value, str) and not is_name(value) else value


class SourceSection(FrozenModel):
    """The source model's origin."""

    weights: Annotated[str | Path, AfterValidator(_path_or_name)] | None = None
    """Source weights: a file, a folder as save_pretrained writes it, or a name: torchvision:ResNet18_Weights.DEFAULT,
    timm:resnet18.a1_in1k, torchaudio:WAV2VEC2_BASE, hf:ORG/NAME@REVISION (safetensors), or a URL with #sha256=... The
    spec that a run writes names the very weights it took. null: a source model is trained on the source data, and
    cached."""
    key: str | None = None
    """Entry of the file that holds the weights, such as state_dict_ema; dots lead to nested ones. null: state_dict,
    model_state_dict, model or module, in this order, or else the only dictionary of tensors."""
    prefix: str | None = None
    """What the names of the wanted tensors begin with, such as backbone; removed, and other tensors are left out."""
    rename: dict[str, str] = Field(default_factory=dict)
    """Regular expression -> replacement, for names in the file that differ from the model's; in order, after prefix."""
    data: Literal["auto"] | None = "auto"
    """auto: the source part of ``data`` (other speakers, uncorrupted images, other classes). null: the source comes
    without data; what the model keeps of it is then measured against the source model's own outputs."""
    labels: tuple[str, ...] | None = None
    """The labels of the source model's outputs, in order. null: those that the source data gives. The source's
    examples are numbered by them. If they equal the target's, in the same order, the source's head serves the target
    too."""
    training: Training = Training(epochs=30, lr=1e-3, schedule="one_cycle", evaluate_every=1000)
    """How a source model is trained if no weights are given."""
    cache: Place | None = None
    """Folder for trained source models, keyed by content. null: ``.cache/conservtl`` in the home folder."""

    @property
    def shown(self) -> str:
        """The weights' name in messages."""
        return self.weights.name if isinstance(self.weights, Path) else str(self.weights)

    def pinned(self) -> SourceSection:
        """Return the section with a name that means the same weights later too.

        Raises:
            SourceError: the name is wrong, or the server that knows it cannot be reached.
        """
        if not isinstance(self.weights, str) or (reference := reference_of(self.weights)) is None:
            return self
        return self.model_copy(update={"weights": str(reference.pinned())})


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
"""Labels of the baselines of a comparison, as specs name them; ``studies.variants`` has their ids and roles."""

Overrides = dict[str, Any]
_Values = TypeVar("_Values", bound=Sequence[Any])


def _distinct(values: _Values) -> _Values:
    """Return values of which none stands twice: its runs would count twice."""
    if twice := [value for place, value in enumerate(values) if value in values[:place]]:
        raise ValueError(f"each must stand once; {twice[0]} stands twice")
    return values


def _rising(values: _Values) -> _Values:
    if any(high <= low for low, high in pairwise(values)):
        raise ValueError(f"they must rise; received {', '.join(f'{value:g}' for value in values)}")
    return values


Distinct = AfterValidator(_distinct)
Seeds = Annotated[int, Field(ge=1, le=1000)]


class _Section(FrozenModel):
    targets: Annotated[tuple[str, ...], Distinct] | None = None
    """Targets to run: speakers, names of corruptions, ... null: every target that the task finds in the data."""
    seeds: Seeds = 3
    """Runs of each variant, with seeds from the spec's upward: other shots, other order, another source model."""


class CompareSection(_Section):
    """Variants against baselines over targets, seeds and shots."""

    seeds: Seeds = 5
    """Runs of each variant, with seeds from the spec's upward: other shots, other order, another source model."""
    shots: Annotated[tuple[Shots, ...], Field(min_length=1), Distinct] | None = None
    """Numbers of shots, ``{up_to: 5}`` and ``all`` among them where the task takes these; null: the spec's."""
    variants: dict[str, Overrides] = Field(default_factory=dict)
    """Name -> fields of the spec that differ, by dotted name: {"strong": {"strategies.0.alpha": 30}}. Empty:
    the spec unchanged."""
    baselines: Annotated[tuple[Baseline, ...], Distinct] = BASELINES
    """The baselines to run. By default joint training is left out where the source has no data, or labels that the
    target lacks."""
    rates: Annotated[tuple[Positive, Positive, Positive], AfterValidator(_rising)] = (1e-4, 3e-4, 1e-3)
    """Low, middle and high rate of plain fine-tuning. With two shots or more each stops early on a part of the shots
    and keeps its best weights: by the spec's ``training.keep`` and ``data.validation`` if it selects, else by the
    target, on a fifth."""
    probe_rate: Positive = 1e-2
    """Rate of the linear probe."""
    scratch_rate: Positive = 1e-3
    """Rate of training from scratch."""


class SweepSection(_Section):
    """Number of transferred layers, and strength of a conservation method."""

    layers: Annotated[tuple[NonNegativeInt, ...], Distinct] | None = None
    """Numbers of layers transferred; null: from none to all but the head. Empty: no layers are swept."""
    sides: Annotated[tuple[Literal["input", "output"], ...], Field(min_length=1), Distinct] = ("input", "output")
    """Sides to count the layers from."""
    controls: bool = True
    """Whether to train networks that transfer from themselves too (BnB and BnB+)."""
    strategy: Overrides | None = None
    """The method whose strength is swept, as fields of a strategy; null: the spec's first strategy that has one of the
    fields ``alpha``, ``rho`` or ``weight``, or decoupled L2-SP."""
    strengths: Annotated[tuple[NonNegative, ...], Distinct] | None = None
    """Strengths; null: six decades around the method's. Empty: no strength is swept."""


class TuneSection(_Section):
    """Search over the fields that are marked with a range."""

    trials: Count = 30
    """Trials of the folder (``--out``): processes that work in it share them, a repeated command goes on until there
    are so many, and folders that share a storage add up."""
    objective: Literal["target", "harmonic", "both"] = "harmonic"
    """The task's headline metric on validation parts. target: of the target; harmonic: of target and source together
    (the harmonic mean where higher is better, else the mean); both: of each (a Pareto front)."""
    storage: str | None = None
    """Where Optuna keeps the study that processes share: the URL of a database (``postgresql://user@host/name``), or
    ``journal:FILE`` for a file on a file system that machines share; null: a SQLite file in the folder."""
    prune: bool = True
    """Whether to give up trials that fall behind the median (one objective only)."""
    seeds: Seeds = 1
    """Runs of each trial, which are averaged."""
