"""The practitioner's table: from the evidence to strategies, with one sentence of reason for each choice."""

from __future__ import annotations

from typing import Any

from conservtl.data.shots import taken_text
from conservtl.errors import counted
from conservtl.experiments.advice.evidence import Evidence
from conservtl.experiments.advice.reason import Advice, Reason, longer
from conservtl.experiments.advice.thresholds import (
    CONSERVATION,
    ENOUGH,
    FAR_DECAY,
    KEPT,
    NEAR_DECAY,
    NORMS,
    STEPS,
    Size,
    far,
    size,
)

__all__ = ["Advice", "Reason", "advise"]

_SIDES = {
    "labels": "The labels are new, so the input side is kept (edges, shapes and sounds are shared) and the output side "
    "changes.",
    "speaker": "The same words come from another speaker, so the output side is kept and the input side is tuned.",
    "input": "The same labels belong to inputs that look different, so the first blocks are tuned.",
}
_CONSERVATION = {
    "labels": "Decoupled L2-SP pulls toward the source, and the end is 0.8 of the way from it, because new labels move "
    "the body farther than they need.",
    "speaker": "The features of four layers are kept near the source's for the same recordings (DELTA).",
    "input": "Decoupled L2-SP pulls toward the source, and the end lies on the line between it and the trained "
    "weights, which serves both kinds of inputs.",
}


def advise(evidence: Evidence) -> Advice:
    """Choose the tuned side by the shift, how much is trained by the table, the kept side's rates by the distance."""
    amount, (distant, by) = size(evidence), far(evidence)
    each = counted(round(1 / evidence.per_parameter), "parameter")
    where = f"{amount} data ({_count(evidence)} a class, one for {each})"
    measured = (
        Reason("side", _SIDES[evidence.shift]),
        Reason("distance", f"The domains are {'far apart' if distant else 'near'}: {by}."),
    )
    if evidence.shift == "labels" and (amount == "little" or _features_suffice(evidence)):
        return _frozen_features(evidence, amount, where, measured)
    new = evidence.shift == "labels"
    strategies: list[dict[str, Any]] = []
    choices = list(measured)
    if new and amount == "medium":
        strategies.append(_in_stages(evidence) if distant else {"kind": "lp_ft", "epochs": _stage(evidence)})
        then = "then the blocks next to it, then the rest" if distant else "then everything"
        choices.append(Reason("amount", f"With {where}, the head is trained first, {then}."))
    elif amount == "little":
        kept = max(1, round(KEPT * (len(evidence.layers) + 1)))
        strategies.append({"kind": "layer_transfer", "side": "output", "layers": kept})
        last = counted(kept, "layer", "is")
        reason = f"With {where}, the last {last} frozen, including the head, which knows the labels."
        choices.append(Reason("amount", reason))
    else:
        choices.append(Reason("amount", f"With {where}, everything is trained."))
    if amount == "little":
        reason = "The trained layers share one rate."
    else:
        decay, side = FAR_DECAY if distant else NEAR_DECAY, "lower" if new else "upper"
        strategies.append({"kind": "discriminative_lr", "decay": decay, "toward": "output" if new else "input"})
        reason = f"Each layer's rate is {decay:g} of that of the next, toward the {side} layers."
    choices.append(Reason("rates", reason))
    strategies += CONSERVATION[evidence.shift]
    choices.append(Reason("conservation", _CONSERVATION[evidence.shift]))
    if evidence.batch_norms and not new:
        strategies.append(NORMS[evidence.shift])
    choices.append(_norms(evidence))
    if (epochs := _epochs(evidence)) > evidence.epochs:
        choices.append(Reason("length", longer(evidence.epochs, evidence.steps, STEPS)))
    training = {
        "epochs": epochs,
        "schedule": "cosine",
        "warmup": 0.05,
        "batch_norm": "train" if new else "eval",
    }
    return Advice(tuple(strategies), training, tuple(choices))


def _frozen_features(evidence: Evidence, amount: Size, where: str, measured: tuple[Reason, ...]) -> Advice:
    """Return a classifier on frozen features: with little data, or if they are good enough."""
    layers = evidence.best_layers
    names = f"{layers[0]} to {layers[-1]}" if len(layers) > 1 else layers[0]
    best = max(evidence.log_me[layer] for layer in layers)
    reason = f"With {where}, the body is frozen and an SVM is fitted to its features."
    if amount != "little":
        reason = (
            f"Frozen features are enough: an SVM on them is right on {evidence.features_accuracy:.0%} of the shots "
            f"held out of it ({ENOUGH:.0%} suffice), so training the body can gain little and would cost the source."
        )
    source = f"They come from {names}, whose LogME is within the margin of the best ({best:.2f} nats an example)."
    choices = (
        *measured,
        Reason("amount", reason),
        Reason("features", source),
        Reason("conservation", "The source's weights do not change, so the source loses nothing."),
    )
    return Advice(({"kind": "feature_extraction", "classifier": "svm", "layers": list(layers)},), {}, choices)


def _in_stages(evidence: Evidence) -> dict[str, Any]:
    """Return phases: the head, then the upper half of the body too, then everything."""
    upper = evidence.layers[len(evidence.layers) // 2 :]
    stages = [{"train": [*below, evidence.head], "epochs": _stage(evidence)} for below in ((), upper)]
    return {"kind": "gradual_unfreezing", "phases": [*stages, {}]}


def _norms(evidence: Evidence) -> Reason:
    if evidence.shift == "labels":
        return Reason("norms", "Batch norms follow the target: with new labels no statistics are shared.")
    if not evidence.batch_norms:
        return Reason("norms", "No batch norm keeps statistics that could be lost.")
    share = 1 / (NORMS[evidence.shift]["prior"] + 1)
    return Reason(
        "norms",
        f"Batch norms keep the source's statistics, which are lost first, and mix in {share:.0%} of each example's "
        "own, so that they fit examples of either domain.",
    )


def _features_suffice(evidence: Evidence) -> bool:
    return evidence.features_accuracy is not None and evidence.features_accuracy >= ENOUGH


def _epochs(evidence: Evidence) -> int:
    """Return the spec's epochs, or as many as make the fewest steps."""
    return max(evidence.epochs, -(-STEPS // evidence.steps))


def _stage(evidence: Evidence) -> int:
    """Epochs of each stage before everything is trained."""
    return max(1, _epochs(evidence) // 5)


def _count(evidence: Evidence) -> str:
    return f"{taken_text((evidence.fewest, evidence.most))} example{'' if evidence.most == 1 else 's'}"
