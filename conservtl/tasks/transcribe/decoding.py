"""Texts from the outputs of a CTC model, and what its frames need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from conservtl.errors import DataError, counted
from conservtl.functions import logits_of
from conservtl.padding import padding_of_outputs

__all__ = ["check_frames", "confidence", "fault_of", "frames_needed", "frames_of", "greedy", "tokens_of"]


def frames_of(outputs: Any) -> tuple[Tensor, Tensor]:
    """Return logits (N, frames, tokens) and the frames of each utterance, (N,), on the logits' device."""
    logits, padding = logits_of(outputs), padding_of_outputs(outputs)
    if padding is None:
        return logits, torch.full((len(logits),), logits.shape[1], device=logits.device)
    return logits, padding.lengths.to(logits.device)


def greedy(outputs: Any) -> list[list[int]]:
    """Return the tokens of the best path: repeats merged, then blanks dropped."""
    logits, lengths = frames_of(outputs)
    best = logits.argmax(-1).cpu()
    paths = (torch.unique_consecutive(row[:length]) for row, length in zip(best, lengths.tolist(), strict=True))
    return [path[path > 0].tolist() for path in paths]


def confidence(outputs: Any) -> Tensor:
    """Return the mean posterior of each best path over its frames that are no blank, (N,); 0 where all are blank."""
    logits, lengths = frames_of(outputs)
    best, answers = logits.float().softmax(-1).max(-1)
    valid = torch.arange(logits.shape[1], device=logits.device) < lengths.unsqueeze(1)
    spoken = valid & (answers > 0)
    return torch.where(spoken, best, 0).sum(1) / spoken.sum(1).clamp_min(1)


def fault_of(outputs: Any, tokens: int) -> str | None:
    """Return why outputs are not (logits, lengths) of a CTC model with this many tokens, or None."""
    logits, padding = logits_of(outputs), padding_of_outputs(outputs)
    fix = "Return (logits, lengths), with logits of (N, frames, tokens) and the frames of each utterance, (N,)."
    if logits.ndim != 3:
        return f"must return logits of (N, frames, tokens); it returns {tuple(logits.shape)}. {fix}"
    if padding is None or padding.lengths.shape != logits.shape[:1]:
        return (
            f"must return the frames of each of {counted(len(logits), 'utterance')} beside its logits; it does "
            f"not. {fix}"
        )
    if padding.lengths.is_floating_point():
        return f"must return lengths in frames; it returns {padding.lengths.tolist()}. {fix}"
    if logits.shape[2] != tokens:
        return (
            f"must have an output for each of {counted(tokens, 'token')}, the blank among them; it has "
            f"{logits.shape[2]}. Leave "
            "the number of outputs out of the section model, or correct data.tokens."
        )
    return None


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

    Args:
        lengths: (N,) frames of the model's outputs.
        labels: (N, tokens), negative where padded.
        names: of the utterances.
        changed: whether recordings were changed at random, and may be shorter than their own.

    Raises:
        DataError: names the first such utterance.
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
