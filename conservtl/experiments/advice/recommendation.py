"""Recommendation of strategies for a spec: measured, decided by the practitioner's table, the rate by a range test."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from conservtl.experiments.advice.evidence import Evidence, gather
from conservtl.experiments.advice.lr_range_test import RangeTest, lr_find
from conservtl.experiments.advice.rules import Reason, advise
from conservtl.experiments.advice.thresholds import far, size
from conservtl.experiments.run.setting import prepare
from conservtl.experiments.run.source_training import obtain_source
from conservtl.experiments.spec.spec import Spec, dump_spec, load_spec, parse_spec
from conservtl.storage.files import write_text

__all__ = ["Recommendation", "recommend"]

LOWEST_RATE, HIGHEST_RATE = 1e-5, 1e-3
"""Usual bounds of a fine-tuning rate. The rate is the geometric mean of the range test's suggestion and the task's
usual rate: a test on a few examples is noisy, and measures the target alone."""


@dataclass(frozen=True)
class Recommendation:
    """A spec for ``run``, with the reasons and the numbers behind it; printed, it shows all of them.

    Args:
        spec: the recommended spec.
        choices: one sentence of reason for each choice.
        evidence: the measurements.
        range_test: the range test that set the rate; None if nothing is trained, or no test was wanted.
    """

    spec: Spec
    choices: tuple[Reason, ...]
    evidence: Evidence
    range_test: RangeTest | None

    @property
    def numbers(self) -> dict[str, Any]:
        """The numbers as JSON."""
        measured = asdict(self.evidence)
        distant, by = far(self.evidence)
        return {**measured, "size": size(self.evidence), "far": distant, "far_by": by}

    def write(self, path: str | Path) -> None:
        """Write the spec as YAML, the reasons above it as comments."""
        said = [f"# {choice.what}: {choice.reason}" for choice in self.choices]
        said += [f"# left out: {what}" for what in self.evidence.left_out]
        write_text("\n".join([*said, dump_spec(self.spec)]), path)

    def __str__(self) -> str:
        found = self.evidence
        widest = max(map(len, found.layers))
        lines = [f"{choice.what:13} {choice.reason}" for choice in self.choices]
        lines += [f"{'left out':13} {what}" for what in found.left_out]
        lines += ["", f"{'layer':{widest}}  LogME  A-distance"]
        for name in found.layers:
            away = f"{found.distances[name]:10.2f}" if name in found.distances else f"{'-':>10}"
            mark = " *" if name in found.best_layers else ""
            lines.append(f"{name:{widest}}  {found.log_me[name]:5.2f}  {away}{mark}")
        lines += [
            f"* within the margin of the best LogME; LEEP {found.leep:.2f}, of {-found.entropy:.2f} to 0",
            "",
            _short(self.spec).rstrip(),
        ]
        return "\n".join(lines)


def recommend(spec: Spec | Mapping[str, Any] | str | Path, *, range_test: bool = True) -> Recommendation:
    """Recommend strategies and training settings for a spec's data and source model.

    It measures the number of examples a class and a parameter; the proxy A-distance between source and target at each
    depth; LogME at each depth, and LEEP of the source model's outputs. Then the kind of shift decides which side is
    tuned, the practitioner's table how much of it, the distance how far the kept side's rates are below, and a range
    test the rate. It reads the shots and the source's data only, never a test part.

    Args:
        spec: a spec, its fields, or its file. Data, model, source and the rest of ``training`` stay; strategies,
            rate, schedule and norm policy are recommended.
        range_test: False keeps the spec's rate, within the usual bounds.

    Raises:
        DataError: the data is missing, has one class only, or fewer examples than shots.
        SpecError: a field is wrong.
        MissingExtraError: scikit-learn is not installed.

    Example:
        >>> import conservtl as ctl
        >>> found = ctl.recommend("examples/vision/spec.yaml")  # doctest: +SKIP
        >>> found.write("recommended.yaml")  # doctest: +SKIP
    """
    given = _read(spec)
    bare = given.model_copy(update={"strategies": ()})
    setting = prepare(bare)
    evidence = gather(setting, obtain_source(setting))
    advice = advise(evidence)
    fields = bare.model_dump(mode="json")
    fields["strategies"] = list(advice.strategies)
    fields["training"] |= advice.training
    found = parse_spec(fields)
    choices, seen = list(advice.choices), None
    if "feature_extraction" not in {one.kind for one in found.strategies}:
        rate = found.training.lr
        if range_test:
            seen = lr_find(found)
            rate = math.sqrt(found.problem.usual_lr * _bounded(seen.suggestion))
        lr = float(f"{_bounded(rate):.1e}")
        choices.append(Reason("rate", _rate(lr, found.problem.usual_lr, seen)))
        training = found.training.model_copy(update={"lr": lr})
        found = found.model_copy(update={"training": training})
    return Recommendation(found, tuple(choices), evidence, seen)


def _read(spec: Spec | Mapping[str, Any] | str | Path) -> Spec:
    if isinstance(spec, (str, Path)):
        return load_spec(spec)
    return parse_spec(spec) if isinstance(spec, Mapping) else spec


def _short(spec: Spec) -> str:
    """The chosen fields, as a person would write them in a spec."""
    strategies = [{"kind": one.kind, **one.model_dump(mode="json", exclude_defaults=True)} for one in spec.strategies]
    training = spec.training.model_dump(mode="json", exclude_defaults=True)
    return yaml.safe_dump({"strategies": strategies, "training": training}, sort_keys=False, allow_unicode=True)


def _rate(lr: float, usual: float, seen: RangeTest | None) -> str:
    if seen is None:
        return f"{lr:.1e} is the spec's rate, within the usual {LOWEST_RATE:g} to {HIGHEST_RATE:g}."
    tenth = f"{seen.suggestion:.1e}, a tenth of the rate where the range test's loss is lowest"
    if _bounded(seen.suggestion) != seen.suggestion:
        tenth = f"{_bounded(seen.suggestion):g}, the usual bound (the range test suggests {seen.suggestion:.1e})"
    return f"{lr:.1e} is the geometric mean of the usual {usual:g} and {tenth}."


def _bounded(rate: float) -> float:
    return min(HIGHEST_RATE, max(LOWEST_RATE, rate))
