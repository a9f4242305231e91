"""The practitioner's table: from what was measured to what to do, and one sentence of reason for each choice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from conservtl.experiments.advice.evidence import Evidence
from conservtl.experiments.spec.recipes import RECIPES

__all__ = ["Advice", "Reason", "Size", "advise", "far", "size"]

Size = Literal["little", "medium", "much"]

LITTLE_A_CLASS = 5
"""Examples a class up to which there is little: cross-validation has one example a fold left to judge by."""
MUCH_A_CLASS = 100
"""From here on there is much, whatever the network: what fine-tuning papers call the full training set of a small task
(Flowers, Pets and Dogs have 20 to 100)."""
LITTLE_A_PARAMETER = 1 / 4000
MUCH_A_PARAMETER = 1 / 1000
"""A small network needs fewer. For the shipped ones, of 144 and 270 thousand parameters, 5 recordings of ten words and
25 images of ten classes are medium, 15 and 100 are much."""
FAR_DISTANCE = 1.8
"""Proxy A-distance at which a linear classifier tells the domains apart with 5 % errors. Speakers of free spoken digits
are at 0.8 to 1.7 from the others, corrupted CIFAR-10 images at 1.9 to 2.0 from the clean ones."""
FAR_STATISTICS = 0.3
"""Standard deviations by which norms see something else than they did. Another speaker: 0.17 to 0.23; new digits: 0.12;
corrupted CIFAR-10 images: 0.41 to 0.65."""
FAR_LEEP = 0.5
"""Share of the labels' entropy that the source's outputs leave open, above which they are far. Speakers: 0.06 to 0.33;
corruptions: 0.7 to 0.9."""
ENOUGH = 0.9
"""Held-out accuracy of frozen features at which the body is left alone: what fine-tuning could still gain on the target
is less than what it cost the source."""
NEAR_DECAY, FAR_DECAY = 0.7, 0.9
"""Factor on the rate from one layer to the next, away from the side that is tuned: at ten layers the kept side's is
0.04 or 0.39 of the full rate."""
KEPT = 0.4
"""Share of the layers that stands still where there is little data."""
CONSERVATION: dict[str, tuple[dict[str, Any], ...]] = {
    "labels": (
        {"kind": "l2_sp", "mode": "decoupled", "alpha": 30.0},
        {"kind": "weight_interpolation", "t": 0.8},
    ),
    "speaker": tuple(one.model_dump() for one in RECIPES["speaker"].strategies if one.kind != "norm_adaptation"),
    "input": tuple(one.model_dump() for one in RECIPES["vision"].strategies if one.kind != "norm_adaptation"),
}
"""Shift -> what holds the model to the source: where the labels stay, what the recipes were measured with."""
NORMS = {
    shift: next(one.model_dump() for one in RECIPES[name].strategies if one.kind == "norm_adaptation")
    for shift, name in (("speaker", "speaker"), ("input", "vision"))
}
"""Shift -> what the norms go by where the labels stay, likewise."""
STEPS = 200
"""Optimizer steps at least: so many were enough for every spec that is shipped."""


@dataclass(frozen=True)
class Reason:
    """One choice, and why.

    Args:
        what: features, side, amount, rates, conservation, norms, rate, length.
        reason: one sentence, with its numbers.
    """

    what: str
    reason: str


@dataclass(frozen=True)
class Advice:
    """What to do.

    Args:
        strategies: as fields of a spec.
        training: fields of ``training`` that are chosen.
        choices: the reasons.
    """

    strategies: tuple[dict[str, Any], ...]
    training: dict[str, Any]
    choices: tuple[Reason, ...]


def size(found: Evidence) -> Size:
    """How much data there is: by examples a class or by examples a parameter, whichever says more."""
    if found.fewest >= MUCH_A_CLASS or found.each >= MUCH_A_PARAMETER:
        return "much"
    return "medium" if found.fewest > LITTLE_A_CLASS or found.each > LITTLE_A_PARAMETER else "little"


def far(found: Evidence) -> tuple[bool, str]:
    """Whether the domains are far apart, and by what.

    By the proxy A-distance where it was measured, else by the norms' statistics, else by LEEP.
    """
    if found.distance is not None:
        return found.distance >= FAR_DISTANCE, f"proxy A-distance {found.distance:.2f}, far is {FAR_DISTANCE} and more"
    if found.statistics is not None:
        says = f"the norms see a shift of {found.statistics:.2f} standard deviations, far is {FAR_STATISTICS} and more"
        return found.statistics >= FAR_STATISTICS, says
    left = -found.leep / found.entropy
    return left >= FAR_LEEP, f"the source's outputs leave {left:.0%} of the labels open, far is {FAR_LEEP:.0%} and more"


def advise(found: Evidence) -> Advice:
    """The domain's rule chooses the side, the table how much of it, the distance the kept side's rates.

    Args:
        found: what was measured.
    """
    amount, (distant, by) = size(found), far(found)
    where = f"{amount} data ({_count(found.fewest)} a class, one for {1 / found.each:,.0f} parameters)"
    apart = f"{'far' if distant else 'near'} ({by})"
    if found.shift == "labels" and (amount == "little" or _enough(found)):
        return _features(found, amount, where, apart)
    new = found.shift == "labels"
    strategies: list[dict[str, Any]] = []
    choices = [_side(found)]
    if new and amount == "medium":
        strategies.append(_in_stages(found) if distant else {"kind": "lp_ft", "epochs": _stage(found)})
        choices.append(Reason("amount", _medium(where, apart, distant=distant)))
    elif amount == "little":
        kept = max(1, round(KEPT * (len(found.layers) + 1)))
        strategies.append({"kind": "layer_transfer", "side": "output", "layers": kept})
        choices.append(
            Reason(
                "amount", f"With {where}, the last {kept} layers stand still, the head with them: it knows the labels."
            )
        )
    else:
        choices.append(Reason("amount", f"With {where}, everything is trained."))
    if amount == "little":
        reason = f"The domains are {apart}; the layers that are trained share one rate, for the others have none."
    else:
        decay, side = FAR_DECAY if distant else NEAR_DECAY, "lower" if new else "upper"
        strategies.append({"kind": "discriminative_lr", "decay": decay, "toward": "output" if new else "input"})
        reason = f"The domains are {apart}, so rates fall by {decay:g} a layer toward the {side} layers."
    choices.append(Reason("rates", reason))
    strategies += CONSERVATION[found.shift]
    choices.append(_conservation(found))
    if found.batch_norms and not new:
        strategies.append(NORMS[found.shift])
    choices.append(_norms(found))
    if (epochs := _epochs(found)) > found.epochs:
        few = f"{found.epochs} epochs of {found.steps} are few steps"
        choices.append(Reason("length", f"{few}: {epochs} epochs make at least {STEPS}."))
    training = {
        "epochs": epochs,
        "schedule": "cosine",
        "warmup": 0.05,
        "batch_norm": "train" if new else "eval",
    }
    return Advice(tuple(strategies), training, tuple(choices))


def _features(found: Evidence, amount: Size, where: str, apart: str) -> Advice:
    layers = found.best_layers
    names = f"{layers[0]} to {layers[-1]}" if len(layers) > 1 else layers[0]
    best = found.log_me[max(layers, key=found.log_me.__getitem__)]
    choices = [_side(found)]
    if amount != "little":
        choices.append(
            Reason(
                "amount",
                f"Frozen features are enough: an SVM on them is right on {found.features_accuracy:.0%} of the shots "
                f"held out of it ({ENOUGH:.0%} asked for), so training the body can gain little and would cost the "
                "source.",
            )
        )
    else:
        choices.append(Reason("amount", f"With {where}, the body stands still and an SVM is fitted to its features."))
    choices.append(
        Reason(
            "features",
            f"They come from {names}, whose LogME is within the margin of the best ({best:.2f} nats an example); the "
            f"domains are {apart}.",
        )
    )
    strategy = {"kind": "feature_extraction", "classifier": "svm", "layers": list(layers)}
    choices.append(Reason("conservation", "Nothing of the source is touched, so nothing of it is lost."))
    return Advice((strategy,), {}, tuple(choices))


def _side(found: Evidence) -> Reason:
    if found.shift == "labels":
        reason = (
            "The labels are new, so the input side is kept (edges, shapes and sounds are shared) and the output side "
        )
        reason += "changes."
    elif found.shift == "speaker":
        reason = "The same words come from another speaker, so the output side is kept and the input side is tuned."
    else:
        reason = "The same labels belong to images that look different, so the first blocks are what to tune."
    return Reason("side", reason)


def _medium(where: str, apart: str, *, distant: bool) -> str:
    if distant:
        return f"With {where} and domains {apart}, the head goes first, then the blocks next to it, then the rest."
    return f"With {where} and domains {apart}, the head goes first, then everything."


def _in_stages(found: Evidence) -> dict[str, Any]:
    """The head, then the upper half of the body too, then everything."""
    upper = found.layers[len(found.layers) // 2 :]
    stages = [{"train": [*below, found.head], "epochs": _stage(found)} for below in ((), upper)]
    return {"kind": "gradual_unfreezing", "phases": [*stages, {}]}


def _stage(found: Evidence) -> int:
    """Epochs of what comes before everything is trained."""
    return max(1, _epochs(found) // 5)


def _conservation(found: Evidence) -> Reason:
    reasons = {
        "labels": "Decoupled L2-SP pulls toward the source, and the end is 0.8 of the way from it, for new labels move "
        "the body farther than they need.",
        "speaker": "LayerFeatures of four layers are held to what the source makes of the same recordings (DELTA).",
        "input": "Decoupled L2-SP pulls toward the source, and the end lies on the line between it and the trained "
        "weights, which serves both kinds of images.",
    }
    return Reason("conservation", reasons[found.shift])


def _norms(found: Evidence) -> Reason:
    if found.shift == "labels":
        return Reason("norms", "Batch norms follow the target: with new labels no statistics are shared.")
    if not found.batch_norms:
        return Reason("norms", "No batch norm keeps statistics that could be lost.")
    share = 1 / (NORMS[found.shift]["prior"] + 1)
    return Reason(
        "norms",
        f"Batch norms keep the source's statistics, which are lost first, and mix in {share:.0%} of each example's "
        "own, so that examples of either domain are seen as they need to be.",
    )


def _enough(found: Evidence) -> bool:
    return found.features_accuracy is not None and found.features_accuracy >= ENOUGH


def _epochs(found: Evidence) -> int:
    return max(found.epochs, -(-STEPS // found.steps))


def _count(examples: int) -> str:
    return f"{examples} example{'' if examples == 1 else 's'}"
