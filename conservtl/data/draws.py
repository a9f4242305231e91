"""Drawing the shots to adapt with, and a validation part of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from conservtl.data.shots import Shots, number_of_shots
from conservtl.errors import DataError, counted

__all__ = ["carve", "draw_shots"]


def draw_shots(labels: Sequence[int], shots: Shots, seed: int, spare: int = 1) -> tuple[list[int], list[int]]:
    """Draw ``shots`` examples a label by ``seed``; return their positions and those of all others, both in order.

    Args:
        labels: the label of each example.
        shots: a number is drawn of each label; ``all`` and ``UpTo`` leave ``spare`` examples of each that has more.
        seed: draws them.
        spare: fewest examples of each label to leave for the test; 0 if the test has examples of its own.

    Raises:
        DataError: a label has fewer than ``shots`` examples, or none is left to test with.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen: set[int] = set()
    for label in sorted(set(labels)):
        places = [i for i, other in enumerate(labels) if other == label]
        if isinstance(shots, int) and len(places) < shots + spare:
            left = f"{shots} to adapt with leave none to test on" if spare else f"{shots} were asked for"
            raise DataError(
                f"data.shots: label {label} has {counted(len(places), 'example')}; {left}. Ask for at most "
                f"{len(places) - spare}, or {{up_to: {shots}}}."
            )
        count = number_of_shots(shots, len(places), spare)
        chosen |= {places[i] for i in torch.randperm(len(places), generator=generator)[:count].tolist()}
    rest = [i for i in range(len(labels)) if i not in chosen]
    if spare and not rest:
        raise DataError("data.shots: every label has one example, so none is left to test on. Add examples.")
    return sorted(chosen), rest


def carve(labels: Sequence[int], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Split the shots into positions to train on and to validate on, label by label.

    At least one example a label stays in each part; with one example a label, or ``fraction`` 0,
    there is no validation part (the second list is empty).
    """
    generator = torch.Generator().manual_seed(seed + 1)
    held: set[int] = set()
    for label in sorted(set(labels)):
        places = [i for i, other in enumerate(labels) if other == label]
        count = min(len(places) - 1, max(1, round(fraction * len(places)))) if fraction > 0 else 0
        held |= {places[i] for i in torch.randperm(len(places), generator=generator)[:count].tolist()}
    return [i for i in range(len(labels)) if i not in held], sorted(held)
