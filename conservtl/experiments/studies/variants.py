"""The variants of a comparison: baselines and the spec's own, each with an id, a label and a role."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from conservtl.data.shots import may_validate
from conservtl.errors import SpecError
from conservtl.experiments.spec.sections import BASELINES, CompareSection
from conservtl.experiments.spec.spec import Spec, with_fields, with_variant
from conservtl.experiments.studies.trial import How

__all__ = ["Role", "Variant", "baseline_ids", "described", "early_stopping", "left_out", "variants_of"]

Role = Literal["source", "baseline", "bound", "method"]
"""source: the source model itself; baseline: what methods are compared with; bound: a baseline that uses source data,
out of competition; method: what the comparison asks about."""

_EPOCHS_A_STEP = 20  # joint training takes so many times fewer epochs; early stopping evaluates so many times a run


@dataclass(frozen=True)
class Variant:
    """One way to train.

    Args:
        id: a name for programs.
        label: a name for people, unique among the variants of a comparison.
        role: what it is in the comparison.
        how: how it is trained.
        make: makes its spec from that of a run.
    """

    id: str
    label: str
    role: Role
    how: How
    make: Callable[[Spec], Spec]


def variants_of(spec: Spec, section: CompareSection) -> list[Variant]:
    """Return the baselines that apply to a spec, then its own variants.

    Raises:
        SpecError: a variant has the name of a baseline, or joint training is named and cannot be done.
    """
    methods: dict[str, Mapping[str, Any]] = dict(section.variants) or {_name(spec): {}}
    if clash := set(methods) & set(BASELINES):
        raise SpecError(f"compare.variants: {sorted(clash)} are names of baselines. Give them other names.")
    known = {variant.label: variant for variant in _baselines(section)}
    chosen = [known[str(label)] for label in section.baselines]
    lack = _lack_for_joint(spec)
    if lack and section.baselines != BASELINES and "joint training" in section.baselines:
        raise SpecError(
            f"baselines: 'joint training' needs source data with the target's labels, and {lack}. Give some "
            "(source.data in a spec, source_data= in Python), or leave it out."
        )
    chosen = [variant for variant in chosen if variant.how != "joint" or not lack]
    return chosen + [
        Variant(label, label, "method", "adapt", partial(with_variant, name=label, fields=fields))
        for label, fields in methods.items()
    ]


def left_out(spec: Spec, section: CompareSection) -> dict[str, str]:
    """Return the baselines of a comparison that do not apply to a spec -> why."""
    lack = _lack_for_joint(spec) if "joint training" in section.baselines else ""
    return {"joint training": f"it needs source data with the target's labels, and {lack}"} if lack else {}


def _lack_for_joint(spec: Spec) -> str:
    if spec.source.data is None:
        return "there are none"
    return "" if spec.problem.shares_labels(spec.data) else "the source has labels that the target lacks"


def described(variant: Variant, spec: Spec) -> str:
    """Return how a variant is trained, in words."""
    if variant.how == "source":
        return "the source model, not trained"
    made = variant.make(spec)
    begun = {"scratch": "random values, ", "joint": "source and target data together, "}.get(variant.how, "")
    strategies = " + ".join(strategy.label for strategy in made.strategies) or "all layers, no strategy"
    stops = ", stops early on a part of the shots" if made.training.patience and not spec.training.patience else ""
    return f"{begun}{strategies}, rate {made.training.lr:g}{stops}"


def baseline_ids() -> dict[str, tuple[str, Role]]:
    """Return id and role of each baseline by its label."""
    return {variant.label: (variant.id, variant.role) for variant in _baselines(CompareSection())}


def early_stopping(spec: Spec) -> dict[str, Any]:
    """Return the fields that stop a run early and keep its best weights; none with one shot, too few to split.

    If the spec selects (``training.keep`` and ``data.validation``), its rule holds, so that baselines and variants are
    selected alike; else the best weights by the target, on a fifth of the shots.
    """
    if not may_validate(spec.data.shots):
        return {}
    keep = spec.training.keep
    if keep == "path":
        keep = "harmonic" if spec.source.data is not None else "target"
    return {
        "training.keep": "target" if keep == "last" else keep,
        "training.patience": 5,
        "training.evaluate_every": max(1, spec.training.epochs // _EPOCHS_A_STEP),
        "data.validation": spec.data.validation or 0.2,
    }


def _baselines(section: CompareSection) -> list[Variant]:
    plain: dict[str, Any] = {"strategies": []}
    scratch = {**plain, "training.lr": section.scratch_rate, "training.batch_norm": "train"}
    probe = {"strategies": [{"kind": "feature_extraction"}], "training.lr": section.probe_rate}
    interpolated = {"strategies": [{"kind": "weight_interpolation"}], "training.lr": section.rates[1]}
    return [
        Variant("source", "source as it is", "source", "source", _changes(plain)),
        Variant("scratch", "from scratch", "baseline", "scratch", _changes(scratch)),
        Variant("linear_probe", "linear probe", "baseline", "adapt", _changes(probe)),
        *(
            Variant(f"fine_tuning_{name}", f"fine-tuning, {name} rate", "baseline", "adapt", _fine_tuning(rate))
            for name, rate in zip(("low", "middle", "high"), section.rates, strict=True)
        ),
        Variant("interpolated", "fine-tuning, interpolated", "baseline", "adapt", _changes(interpolated)),
        Variant("joint", "joint training", "bound", "joint", _joint),
    ]


def _changes(fields: Mapping[str, Any]) -> Callable[[Spec], Spec]:
    return lambda spec: with_fields(spec, fields)


def _fine_tuning(rate: float) -> Callable[[Spec], Spec]:
    return lambda spec: with_fields(spec, {"strategies": [], "training.lr": rate, **early_stopping(spec)})


def _joint(spec: Spec) -> Spec:
    """As many epochs as make about the steps of adapting."""
    return with_fields(spec, {"strategies": [], "training.epochs": max(1, spec.training.epochs // _EPOCHS_A_STEP)})


def _name(spec: Spec) -> str:
    return " + ".join(strategy.label for strategy in spec.strategies) or "the spec"
