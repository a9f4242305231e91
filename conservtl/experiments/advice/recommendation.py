"""Recommendation of strategies for a spec: measured, decided by the practitioner's table, the rate by a range test."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any, Unpack

import yaml
from torch import nn

from conservtl.engine import Training
from conservtl.engine.randomness import preserve_rng
from conservtl.errors import SpecError
from conservtl.experiments.advice.error_rates import ErrorEvidence, advise_by_errors, gather_errors
from conservtl.experiments.advice.evidence import Evidence, gather
from conservtl.experiments.advice.lr_range_test import RangeTest, lr_find_for
from conservtl.experiments.advice.reason import Reason
from conservtl.experiments.advice.rules import advise
from conservtl.experiments.advice.thresholds import far, size
from conservtl.experiments.own.options import ModelLike, ProblemOptions
from conservtl.experiments.own.problem import OwnProblem, hold, settings_of
from conservtl.experiments.run.source_training import prepare_source
from conservtl.experiments.spec.spec import Spec, dump_spec, load_spec, parse_spec, with_fields
from conservtl.fragments import fragment
from conservtl.methods import Strategy
from conservtl.report.figures.canvas import Picture
from conservtl.report.text.html_table import Cell, HtmlTable, TableRow
from conservtl.source.itself import Itself
from conservtl.source.read import SourceLike
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
    evidence: Evidence | ErrorEvidence
    range_test: RangeTest | None

    @property
    def strategies(self) -> tuple[Strategy, ...]:
        """The recommended strategies, for ``adapt``."""
        return self.spec.strategies

    @property
    def training(self) -> Training:
        """The recommended settings, for ``fit``."""
        return self.spec.training

    @property
    def best(self) -> tuple[Strategy, ...]:
        """The recommended strategies."""
        return self.strategies

    def table(self) -> HtmlTable:
        """Return the choices with their reasons."""
        rows = [TableRow([Cell(choice.what), Cell(choice.reason)]) for choice in self.choices]
        notes = "; ".join(f"left out: {what}" for what in self.evidence.left_out)
        return HtmlTable("Recommendation", notes, ["choice", "reason"], rows, frozenset({0, 1}))

    def layers(self) -> HtmlTable:
        """Return LogME and the proxy A-distance of each layer's features; error rates where there are no classes."""
        return self.evidence.table()

    def figure(self) -> Picture:
        """Return the picture of the range test.

        Raises:
            SpecError: there was no range test.
            MissingExtraError: matplotlib is not installed.
        """
        if self.range_test is None:
            raise SpecError("figure: there was no range test, so there is no figure. Print the recommendation.")
        return self.range_test.figure()

    def _repr_html_(self) -> str:
        parts: list[HtmlTable | RangeTest] = [self.table(), self.layers()]
        parts += [] if self.range_test is None else [self.range_test]
        shown = "".join(part._repr_html_() for part in parts)
        return fragment(shown, f'<pre style="color:inherit;background:transparent">{escape(_short(self.spec))}</pre>')

    @property
    def numbers(self) -> dict[str, Any]:
        """The numbers as JSON."""
        measured = asdict(self.evidence)
        if isinstance(self.evidence, ErrorEvidence):
            return {**measured, "size": self.evidence.size, "distance": self.evidence.distance}
        distant, by = far(self.evidence)
        return {**measured, "size": size(self.evidence), "far": distant, "far_by": by}

    def write(self, path: str | Path) -> None:
        """Write the spec as YAML, the reasons above it as comments.

        Raises:
            SpecError: the model is held in memory, which no spec names.
        """
        if self.spec.held is not None:
            raise SpecError(
                "write: a spec names model and data, and these are held in memory. Use the recommendation's strategies "
                "and training."
            )
        said = [f"# {choice.what}: {choice.reason}" for choice in self.choices]
        said += [f"# left out: {what}" for what in self.evidence.left_out]
        write_text("\n".join([*said, dump_spec(self.spec)]), path)

    def __str__(self) -> str:
        found = self.evidence
        lines = [f"{choice.what:13} {choice.reason}" for choice in self.choices]
        lines += [f"{'left out':13} {what}" for what in found.left_out]
        return "\n".join([_short(self.spec), *lines, "", str(found.table())])


def recommend(
    spec: Spec | Mapping[str, Any] | str | Path | ModelLike,
    source: SourceLike | Itself | None = None,
    train: Any = None,
    training: Training | None = None,
    *,
    range_test: bool = True,
    seed: int = 0,
    **options: Unpack[ProblemOptions],
) -> Recommendation:
    """Recommend strategies and training settings: for a spec, or for your own model, source and data.

    It measures the number of examples a class and a parameter; the proxy A-distance between source and target at each
    depth; LogME at each depth, and LEEP of the source model's outputs. Then the kind of shift decides which side is
    tuned, the practitioner's table how much of it, the distance how far the kept side's rates are below, and a range
    test the rate. For a task without classes that is judged by an error rate (``transcribe``) the source model's error
    rate on the shots decides how far the domains are apart, and the seconds of speech how much is trained. It reads the
    shots and the source's data only, never a test part.

    Args:
        spec: a spec, its fields, or its file. Data, model, source and the rest of ``training`` stay; strategies,
            rate, schedule and norm policy are recommended. Or a model, or a function that returns a new one, as for
            ``compare``.
        source: for a model: as for ``adapt``.
        train: for a model: labelled target examples, as for ``compare``.
        training: for a model: settings of ``fit`` that are not recommended.
        range_test: False keeps the spec's rate, within the usual bounds.
        seed: for a model: seeds the range test.
        options: for a model: as for ``compare``; ``source_data`` for the distance of the domains; ``shift``:
            ``"speaker"`` if the same labels come from another speaker, else ``"input"``; ``usual_lr``, a rate that fits
            the network.

    Raises:
        DataError: the data is missing, has one class only, or fewer examples than shots.
        SpecError: a field is wrong.
        MissingExtraError: scikit-learn is not installed.

    Example:
        >>> import conservtl as ctl
        >>> found = ctl.recommend("examples/vision/spec.yaml")  # doctest: +SKIP
        >>> found.write("recommended.yaml")  # doctest: +SKIP
    """
    if isinstance(spec, nn.Module) or (callable(spec) and not isinstance(spec, (Mapping, str, Path, Spec))):
        with preserve_rng():
            problem = _held(spec, source, train, training, options)
            return _recommend(settings_of(problem, training, seed=seed, options=options), range_test=range_test)
    if not isinstance(spec, (Spec, Mapping, str, Path)):
        raise SpecError(
            f"recommend takes a spec, its fields or its file, or a model or a function that returns one; received "
            f"{type(spec).__name__}."
        )
    if any(given is not None for given in (source, train, training)) or options:
        raise SpecError(
            "recommend: a spec names source, data and training itself; further arguments are for a model. Set the "
            "spec's fields."
        )
    return _recommend(_read(spec), range_test=range_test)


def _recommend(given: Spec, *, range_test: bool) -> Recommendation:
    bare = given.model_copy(update={"strategies": ()})
    setting, source = prepare_source(bare)
    if source.headless:
        raise SpecError(
            "recommend: the source model's outputs are measured (LEEP), and source.weights have no head. Give weights "
            "with a head."
        )
    evidence: Evidence | ErrorEvidence
    if setting.task.has_classes:
        evidence = gather(setting, source)
        advice = advise(evidence)
    else:
        evidence = gather_errors(setting, source)
        advice = advise_by_errors(evidence)
    chosen = {f"training.{name}": value for name, value in advice.training.items()}
    found = with_fields(bare, {"strategies": list(advice.strategies), **chosen})
    choices, seen = list(advice.choices), None
    if "feature_extraction" not in {one.kind for one in found.strategies}:
        rate = found.training.lr
        if range_test:
            seen = lr_find_for(found)
            rate = math.sqrt(found.problem.usual_lr * _bounded(seen.suggestion))
        lr = float(f"{_bounded(rate):.1e}")
        choices.append(Reason("rate", _rate(lr, found.problem.usual_lr, seen)))
        training = found.training.model_copy(update={"lr": lr})
        found = found.model_copy(update={"training": training})
    return Recommendation(found, tuple(choices), evidence, seen)


def _held(model: ModelLike, source: Any, train: Any, training: Training | None, options: ProblemOptions) -> OwnProblem:
    """Return a model with its source and data as a problem."""
    if source is None or train is None:
        raise SpecError(
            f"recommend: a model needs a source and data; {'source' if source is None else 'train'} is missing. Call "
            "recommend(model, source, train)."
        )
    problem = hold(model, source, train, None, training, options)
    if len(problem.task.sets.train) > 1:
        raise SpecError(
            f"recommend: strategies are recommended for one target; received {', '.join(problem.task.sets.train)}. "
            "Give the data of one."
        )
    if problem.headless:
        raise SpecError(
            "recommend: the source model's outputs are measured (LEEP), and it has no head: "
            f"{next(iter(problem.headless))!r} is {next(iter(problem.headless.values()))}. Give a source model with "
            "its own head."
        )
    return problem


def _read(spec: Spec | Mapping[str, Any] | str | Path) -> Spec:
    if isinstance(spec, (str, Path)):
        return load_spec(spec)
    return parse_spec(spec) if isinstance(spec, Mapping) else spec


def _short(spec: Spec) -> str:
    """Return the chosen fields, as a person would write them in a spec."""
    strategies = [{"kind": one.kind, **one.model_dump(mode="json", exclude_defaults=True)} for one in spec.strategies]
    training = spec.training.model_dump(mode="json", exclude_defaults=True)
    return yaml.safe_dump({"strategies": strategies, "training": training}, sort_keys=False, allow_unicode=True)


def _rate(lr: float, usual: float, seen: RangeTest | None) -> str:
    if seen is None:
        return f"{lr:.1e} is the spec's rate, within the usual {LOWEST_RATE:g} to {HIGHEST_RATE:g}."
    found, counts = f"{seen.suggestion:.1e}", f"{_bounded(seen.suggestion):.1e}"
    lowest = f"The loss of the range test is lowest at {10 * seen.suggestion:.1e}, and a tenth of that is {found}."
    if counts != found:
        lowest += f" Usual rates {'end' if seen.suggestion > HIGHEST_RATE else 'begin'} at {counts}, which replaces it."
    return f"{lowest} The geometric mean of {counts} and the task's usual rate, {usual:.1e}, is {lr:.1e}."


def _bounded(rate: float) -> float:
    return min(HIGHEST_RATE, max(LOWEST_RATE, rate))
