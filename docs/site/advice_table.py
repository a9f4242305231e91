"""What `recommend` chooses in each case, by asking the rules themselves."""

from __future__ import annotations

from conservtl.experiments.advice.evidence import ENOUGH_FOR_DISTANCE, Evidence
from conservtl.experiments.advice.rules import advise
from conservtl.experiments.advice.thresholds import (
    FAR_DISTANCE,
    FAR_LEEP,
    FAR_STATISTICS,
    LITTLE_A_CLASS,
    LITTLE_A_PARAMETER,
    MUCH_A_CLASS,
    MUCH_A_PARAMETER,
)
from conservtl.methods import as_strategy

__all__ = ["advice_table", "amount_table", "distance_table"]

_SHIFTS = {
    "speaker": "the same words, another speaker",
    "input": "the same labels, inputs that look different",
    "labels": "new labels",
}
_CLASSES, _PARAMETERS = 10, 1_000_000
_AMOUNTS = {  # examples of each class that make little, medium and much data for a million parameters
    "little": LITTLE_A_CLASS,
    "medium": int(_PARAMETERS * (LITTLE_A_PARAMETER + MUCH_A_PARAMETER) / 2 / _CLASSES),
    "much": MUCH_A_CLASS,
}


def advice_table() -> str:
    """Return a row for each shift, amount of data and distance of the domains."""
    lines = ["| shift | data | domains | strategies |", "| --- | --- | --- | --- |"]
    for shift, told in _SHIFTS.items():
        for amount, shots in _AMOUNTS.items():
            for near in (True, False):
                advice = advise(_evidence(shift, shots, 0.9 * FAR_DISTANCE if near else FAR_DISTANCE))
                strategies = ", ".join(_shown(fields) for fields in advice.strategies)
                lines.append(f"| {told} | {amount} | {'near' if near else 'far'} | {strategies} |")
    return "\n".join(lines)


def amount_table() -> str:
    """Return the limits of little and much data."""
    return "\n".join(
        [
            "| data | examples of the smallest class | or examples for each parameter |",
            "| --- | --- | --- |",
            f"| little | up to {LITTLE_A_CLASS} | and up to 1 for {1 / LITTLE_A_PARAMETER:,.0f} |",
            f"| medium | more than {LITTLE_A_CLASS} | more than 1 for {1 / LITTLE_A_PARAMETER:,.0f} |",
            f"| much | {MUCH_A_CLASS} or more | 1 for {1 / MUCH_A_PARAMETER:,.0f}, or more |",
        ]
    )


def distance_table() -> str:
    """Return the limits between near and far domains, in the order in which they are asked."""
    return "\n".join(
        [
            "| measure | far from | taken |",
            "| --- | ---: | --- |",
            f"| proxy A-distance, 0 to 2 | {FAR_DISTANCE} | with source data and {ENOUGH_FOR_DISTANCE} shots |",
            f"| shift of the norms' statistics, in deviations | {FAR_STATISTICS} | else, if norms keep any |",
            f"| share of the labels' entropy that the source leaves open | {FAR_LEEP:.0%} | else |",
        ]
    )


def _shown(fields: dict[str, object]) -> str:
    """Return a strategy with the fields that differ from its defaults and are short."""
    strategy = as_strategy(fields)
    defaults = type(strategy).model_fields
    changed = {name: value for name, value in strategy.model_dump().items() if value != defaults[name].default}
    short = ", ".join(f"{name}={value!r}" for name, value in changed.items() if len(repr(value)) < 24)
    return f"`{strategy.label}({short})`"


def _evidence(shift: str, shots: int, distance: float) -> Evidence:
    layers = tuple(f"layer{number}" for number in range(1, 10))
    return Evidence(
        shift=shift,
        classes=_CLASSES,
        examples=_CLASSES * shots,
        fewest=shots,
        most=shots,
        parameters=_PARAMETERS,
        layers=layers,
        head="head",
        epochs=30,
        steps=10,
        distance=distance,
        distances=dict.fromkeys(layers, distance),
        statistics=None,
        batch_norms=True,
        log_me=dict.fromkeys(layers, -0.5),
        leep=-0.5,
        entropy=2.3,
        best_layers=layers[-1:],
        features_accuracy=0.8,
        left_out=(),
    )
