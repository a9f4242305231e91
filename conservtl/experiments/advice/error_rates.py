"""Advice for tasks without classes that are judged by an error rate, such as recognition: measured before training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from conservtl.data import length_of, spread
from conservtl.data.sequences import Sequences
from conservtl.errors import DataError, SpecError, counted
from conservtl.experiments.advice.reason import Advice, Reason, longer
from conservtl.experiments.run.scoring import score_model
from conservtl.experiments.run.setting import Setting, prepare
from conservtl.experiments.run.source_training import SourceModel
from conservtl.report.text.html_table import Cell, HtmlTable, TableRow
from conservtl.tasks.base import Shift

__all__ = ["ErrorEvidence", "advise_by_errors", "gather_errors"]

Distance = Literal["near", "apart", "far"]

NEAR = 0.05
"""Rise of the error rate from source to target up to which domains are near: adaptation has little to gain."""
FAR = 0.6
"""Error rate on the target from which domains are far apart: most of what the source model hears is wrong. Speakers of
free spoken digits have 0.3 to 0.5."""
LITTLE, MUCH = 20.0, 600.0
"""Seconds of speech with texts up to which there is little data, and from which there is much: ten minutes are the
smallest training set of Libri-light, with which whole networks are fine-tuned."""
KEPT = 0.4
"""Share of the layers that is frozen if there is little data."""
HEARD = 0.5
"""Error rate up to which hypotheses of the source model are worth training on."""
T, FAR_T = 0.4, 0.7
"""How far the end is from the source: as was best where nothing compares with it; where less of it is worth keeping."""
STEPS = 120
"""Fewest optimizer steps: the recipe's on ten sentences."""
_MOST = 200  # source utterances that are transcribed


@dataclass(frozen=True)
class ErrorEvidence:
    """The numbers behind a recommendation.

    Args:
        shift: labels, speaker or input, as for tasks with classes.
        metric: name of the error rate.
        target: error rate of the source model on the shots; None: none has a label.
        source: on the source's training data, which flatters it; None: not measured.
        utterances: shots with labels.
        seconds: their duration.
        unlabelled: shots without.
        hypotheses: whether those have hypotheses of the source model to train on.
        parameters: number of the model's parameters.
        layers: all layers, input side first.
        epochs: the spec's epochs.
        steps: optimizer steps an epoch.
        left_out: measurements that could not be made, and why.
    """

    shift: Shift
    metric: str
    target: float | None
    source: float | None
    utterances: int
    seconds: float
    unlabelled: int
    hypotheses: bool
    parameters: int
    layers: tuple[str, ...]
    epochs: int
    steps: int
    left_out: tuple[str, ...]

    @property
    def size(self) -> Literal["little", "medium", "much"]:
        """How much data with labels there is."""
        return "little" if self.seconds < LITTLE else "much" if self.seconds >= MUCH else "medium"

    @property
    def distance(self) -> Distance:
        """How far the domains are apart; with no label on the target they are taken as apart."""
        if self.target is None:
            return "apart"
        return "far" if self.target >= FAR else "near" if self.target - (self.source or 0.0) <= NEAR else "apart"

    @property
    def apart(self) -> str:
        """The distance, and the figures that decided."""
        if self.target is None:
            return f"taken as apart (no {self.metric} without texts)"
        than = "" if self.source is None else f", and {self.source:.1%} on its own training data"
        return f"{self.distance} (the source model has a {self.metric} of {self.target:.1%} on the shots{than})"

    def table(self) -> HtmlTable:
        """Return the measurements."""
        rates = {"target, on the shots": self.target, "source, on its training data": self.source}
        shown = [(f"{self.metric}, {on}", "–" if rate is None else f"{rate:.1%}") for on, rate in rates.items()]
        data = f"{self.utterances} ({self.seconds:.0f} s)"
        shown += [("shots with texts", data), ("shots without", str(self.unlabelled))]
        rows = [TableRow([Cell(what), Cell(value)]) for what, value in shown]
        return HtmlTable("Source model on the target, before training", "", ["", "measured"], rows)


def gather_errors(setting: Setting, source: SourceModel) -> ErrorEvidence:
    """Measure the source model's error rate on the shots and on the source's data; train nothing.

    Raises:
        SpecError: the task has no classes, and is not judged by an error rate of sequences either.
        DataError: the error rate is no number.
    """
    task, domains, spec = setting.task, setting.domains, setting.spec
    asked: Any = getattr(spec.data, "unlabelled", None)
    shots: Any = domains.shots if asked is None else prepare(spec).domains.shots  # before hypotheses join them
    if task.headline.better != "lower" or not isinstance(shots, Sequences):
        raise SpecError(
            f"recommend: LogME, LEEP and the count of examples need classes, and the task {task.name!r} has "
            "none. Compare strategies instead: ctl.compare, or conservtl compare and tune for a spec."
        )
    known = shots.labelled or (True,) * len(shots)
    told = shots.take([place for place, one in enumerate(known) if one])
    name, key = task.headline.label, task.headline.metric
    rates: dict[str, float | None] = {"target": None, "source": None}
    left_out = [] if len(told) else [f"{name} on the target: no shot has a text"]
    if domains.source_train is None or not setting.shared:
        left_out.append(f"{name} on the source: the spec gives no source data of the same labels")
    for part, data in (("target", told if len(told) else None), ("source", domains.source_train)):
        if data is not None and (part == "target" or setting.shared):
            rate = score_model(task, source.model, spread(data, _MOST), 16).metrics[key]
            if not math.isfinite(rate):
                raise DataError(
                    f"data: the {name} on the {part} must be a number; received {rate}. Give texts with words."
                )
            rates[part] = rate
    plan = setting.adaptation(source.with_notes()).plan
    return ErrorEvidence(
        shift=setting.shift,
        metric=name,
        target=rates["target"],
        source=rates["source"],
        utterances=len(told),
        seconds=sum(told.seconds),
        unlabelled=len(shots) - len(told),
        hypotheses=asked is not None and asked.pseudo_labels is not None,
        parameters=plan.totals()["all"],
        layers=tuple(plan.layers),
        epochs=spec.training.epochs,
        steps=math.ceil(length_of(domains.shots) / spec.training.step_size),
        left_out=tuple(left_out),
    )


def advise_by_errors(evidence: ErrorEvidence) -> Advice:
    """Choose how much is trained by the amount of data, and how far the end is from the source by the distance."""
    amount, distance = evidence.size, evidence.distance
    where = f"{amount} data ({counted(evidence.utterances, 'utterance')} with texts, {evidence.seconds:.0f} s)"
    strategies: list[dict[str, Any]] = []
    choices = [Reason("distance", f"The domains are {evidence.apart}.")]
    if distance == "near":
        choices[0] = Reason("distance", f"The domains are {evidence.apart}: adaptation has little to gain.")
    new = evidence.shift == "labels"
    side = "The vocabulary is another, so the input side is kept." if new else (
        "The same words sound different, so the output side, which knows them, is kept more than the input side."
    )  # fmt: skip
    choices.append(Reason("side", side))
    if amount == "little" and not new:
        kept = max(1, round(KEPT * len(evidence.layers)))
        strategies.append({"kind": "layer_transfer", "side": "output", "layers": kept})
        last = counted(kept, "layer", "is", of=len(evidence.layers))
        choices.append(Reason("amount", f"With {where}, the last {last} frozen."))
    else:
        choices.append(Reason("amount", f"With {where}, everything is trained."))
    if amount == "much":
        decay, toward = (0.9 if distance == "far" else 0.7), "output" if new else "input"
        strategies.append({"kind": "discriminative_lr", "decay": decay, "toward": toward})
        choices.append(Reason("rates", f"Rates fall by {decay:g} a layer away from the {toward} side."))
    else:
        choices.append(Reason("rates", "The trained layers share one rate."))
    t = FAR_T if distance == "far" or new else T
    strategies.append({"kind": "weight_interpolation", "t": t})
    choices.append(
        Reason("conservation", f"The end is {t:g} of the way from the source, which keeps most of what it knows.")
    )
    choices += _without_texts(evidence, strategies)
    epochs = max(evidence.epochs, -(-STEPS // evidence.steps))
    if epochs > evidence.epochs:
        choices.append(Reason("length", longer(evidence.epochs, evidence.steps, STEPS)))
    training = {"epochs": epochs, "schedule": "cosine", "warmup": 0.1, "clip": 1.0, "batch_norm": "eval"}
    return Advice(tuple(strategies), training, tuple(choices))


def _without_texts(evidence: ErrorEvidence, strategies: list[dict[str, Any]]) -> list[Reason]:
    """Return what utterances without texts are good for; those there already are learnt from by their entropy."""
    heard = evidence.target is not None and evidence.target <= HEARD
    count = counted(evidence.unlabelled, "utterance")
    if evidence.unlabelled and evidence.hypotheses:
        good = "most of them right" if heard else "most of them wrong: collect texts instead"
        good = "how good ones is not known without texts" if evidence.target is None else good
        return [Reason("unlabelled", f"There are hypotheses of {count} without texts, {good}.")]
    if evidence.unlabelled:
        strategies.insert(0, {"kind": "entropy_minimisation", "blank": 0})
        return [Reason("unlabelled", f"The entropy of {count} without texts is learnt from.")]
    if evidence.size == "much" or not heard:
        return []
    reason = (
        f"{1 - (evidence.target or 0):.0%} of what the source model hears is right, so more utterances without texts "
        "(data.unlabelled) can be trained on by its confident hypotheses."
    )
    return [Reason("unlabelled", reason)]
