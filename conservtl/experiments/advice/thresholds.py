"""Thresholds of the recommendation, with the figures that they were set by."""

from __future__ import annotations

from typing import Any, Literal

from conservtl.experiments.advice.evidence import Evidence
from conservtl.experiments.spec.recipes import RECIPES

__all__ = ["CONSERVATION", "ENOUGH", "FAR_DECAY", "KEPT", "NEAR_DECAY", "NORMS", "STEPS", "Size", "far", "size"]

Size = Literal["little", "medium", "much"]

LITTLE_A_CLASS = 5
"""Up to so many examples a class there is little data: cross-validation has one example a fold to judge by."""
MUCH_A_CLASS = 100
"""From so many examples a class there is much data for any network: fine-tuning papers call it the full training set of
a small task (Flowers, Pets and Dogs have 20 to 100)."""
LITTLE_A_PARAMETER = 1 / 4000
MUCH_A_PARAMETER = 1 / 1000
"""A small network needs fewer examples. For the shipped ones, of 144 and 270 thousand parameters, 5 recordings of ten
words and 25 images of ten classes are medium, 15 and 100 are much."""
FAR_DISTANCE = 1.8
"""Proxy A-distance at which a linear classifier separates the domains with 5 % errors. Speakers of free spoken digits
have 0.8 to 1.7 from the others, corrupted CIFAR-10 images 1.9 to 2.0 from the clean ones."""
FAR_STATISTICS = 0.3
"""Shift of the norms' statistics, in standard deviations. Another speaker: 0.17 to 0.23; new digits: 0.12; corrupted
CIFAR-10 images: 0.41 to 0.65."""
FAR_LEEP = 0.5
"""Share of the labels' entropy that the source's outputs do not explain. Speakers: 0.06 to 0.33; corruptions: 0.7 to
0.9."""
ENOUGH = 0.9
"""Held-out accuracy of frozen features from which the body is not trained: fine-tuning could gain less on the target
than it would cost the source."""
NEAR_DECAY, FAR_DECAY = 0.7, 0.9
"""Factor on the rate from one layer to the next, away from the tuned side: at ten layers the rate of the kept side is
0.04 or 0.39 of the full rate."""
KEPT = 0.4
"""Share of the layers that is frozen if there is little data."""
CONSERVATION: dict[str, tuple[dict[str, Any], ...]] = {
    "labels": (
        {"kind": "l2_sp", "mode": "decoupled", "alpha": 30.0},
        {"kind": "weight_interpolation", "t": 0.8},
    ),
    "speaker": tuple(one.model_dump() for one in RECIPES["speaker"].strategies if one.kind != "norm_adaptation"),
    "input": tuple(one.model_dump() for one in RECIPES["vision"].strategies if one.kind != "norm_adaptation"),
}
"""Shift -> strategies that conserve the source; with shared labels those that the recipes were measured with."""
NORMS = {
    shift: next(one.model_dump() for one in RECIPES[name].strategies if one.kind == "norm_adaptation")
    for shift, name in (("speaker", "speaker"), ("input", "vision"))
}
"""Shift -> strategy for the norms, with shared labels."""
STEPS = 200
"""Fewest optimizer steps: enough for every shipped spec."""


def size(evidence: Evidence) -> Size:
    """Return how much data there is: by examples a class or by examples a parameter, whichever gives more."""
    if evidence.fewest >= MUCH_A_CLASS or evidence.per_parameter >= MUCH_A_PARAMETER:
        return "much"
    return "medium" if evidence.fewest > LITTLE_A_CLASS or evidence.per_parameter > LITTLE_A_PARAMETER else "little"


def far(evidence: Evidence) -> tuple[bool, str]:
    """Return whether the domains are far apart, and the figure that decided.

    The figure is the proxy A-distance if it was measured, else the shift of the norms' statistics, else LEEP.
    """
    if (distance := evidence.distance) is not None:
        return distance >= FAR_DISTANCE, f"their proxy A-distance is {distance:.2f} ({FAR_DISTANCE} and more is far)"
    if (shift := evidence.statistics) is not None:
        return shift >= FAR_STATISTICS, f"the norms' statistics shift by {shift:.2f} ({FAR_STATISTICS} and more is far)"
    left = -evidence.leep / evidence.entropy
    return (
        left >= FAR_LEEP,
        f"the source's outputs leave {left:.0%} of the labels open ({FAR_LEEP:.0%} and more is far)",
    )
