"""Frames of the outputs of a CTC model, and those that a text needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from conservtl.errors import DataError
from conservtl.functions import logits_of
from conservtl.padding import padding_of_outputs

__all__ = ["check_frames", "frames_needed", "frames_of", "tokens_of"]


def frames_of(outputs: Any) -> tuple[Tensor, Tensor]:
    """Return logits (N, frames, tokens) and the frames of each utterance, (N,), on the logits' device."""
    logits, padding = logits_of(outputs), padding_of_outputs(outputs)
    if padding is None:
        return logits, torch.full((len(logits),), logits.shape[1], device=logits.device)
    return logits, padding.lengths.to(logits.device)


def frames_needed(labels: Tensor) -> Tensor:
    """Return the frames that CTC needs for each text, (N,): one a token, and a blank between equal neighbours.

    Args:
        labels: (N, tokens), negative where padded.

    >>> frames_needed(torch.tensor([[1, 1, 2], [3, -100, -100]])).tolist()
    [4, 1]
    """
    repeats = (labels[:, 1:] == labels[:, :-1]) & (labels[:, 1:] >= 0)
    return (labels >= 0).sum(1) + repeats.sum(1)


def check_frames(lengths: Tensor, labels: Tensor, names: Sequence[str], *, changed: bool = False) -> None:
    """Raise if a text needs more frames than its utterance has, for then its loss is infinite.

    Labels are negative where padded. Recordings that are changed at random may be shorter than their own.
    """
    needed = frames_needed(labels)
    short = (lengths.to(needed.device) < needed).nonzero().flatten().tolist()
    if short:
        first = short[0]
        name = names[first] if first < len(names) else f"utterance {first} of the batch"
        sped = "lower data.augment.waves.speeds, by which a recording may be shorter, " if changed else ""
        raise DataError(
            f"{name}: a text of CTC must not need more frames than its recording has; it needs {int(needed[first])} "
            f"(with a blank between equal neighbours), and the model gives {int(lengths[first])}. Correct the text, "
            f"{sped}leave the utterance out, or take a model with less subsampling or features with a shorter hop."
        )


def tokens_of(labels: Tensor) -> list[list[int]]:
    """Return the tokens of padded labels, (N, tokens)."""
    return [row[row >= 0].tolist() for row in labels.cpu()]
