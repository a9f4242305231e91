"""Utterances without texts: the source model's own hypotheses in their place, where it is confident."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from conservtl.data.sequences import Sequences
from conservtl.errors import DataError, SpecError, counted
from conservtl.layers import unwrap
from conservtl.runtime.preserve import eval_mode
from conservtl.tasks.transcribe.recognizers import Decoder, answered, recognizer_of

__all__ = ["pseudo_labelled"]


def pseudo_labelled(
    model: nn.Module,
    data: Sequences,
    *,
    least: float = 0.9,
    augment: Callable[[Any, torch.Generator], Any] | None = None,
    seed: int = 0,
    batch_size: int = 16,
) -> Sequences:
    """Return the utterances of which a recognizer is sure, with its hypotheses as labels; theirs are not read.

    ``conservtl.data.sequences.joined([shots, pseudo_labelled(...)])`` trains on a few texts and many hypotheses.

    Args:
        model: the source model, or better one adapted to what texts there are; takes inputs and lengths.
        data: utterances; whatever labels they have are dropped.
        least: smallest mean posterior of the best path over its frames that are no blank, or of a decoder's tokens.
        augment: of a batch, such as ``SpecAugment().of_batch``. Where given, two augmented copies of an utterance must
            also give the same hypothesis.
        seed: of the augmentation.
        batch_size: utterances at once.

    Raises:
        SpecError: ``least`` is no probability.
        DataError: no hypothesis is left.

    Reference:
        Kahn, Lee and Hannun 2020, "Self-training for end-to-end speech recognition", section 3.2.

    Example:
        >>> import torch
        >>> class Sure(torch.nn.Module):
        ...     def forward(self, inputs, lengths):
        ...         return 20 * inputs, lengths
        >>> heard = torch.eye(3)[[0, 1, 1, 0, 2]]
        >>> data = Sequences((heard,), (torch.tensor([], dtype=torch.long),), ("a",), (), (0.05,))
        >>> pseudo_labelled(Sure(), data).labels
        (tensor([1, 2]),)
    """
    if not 0 <= least <= 1:
        raise SpecError(f"least must be a probability; received {least!r}. Set it between 0 and 1.")
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    kept: list[int] = []
    labels: list[torch.Tensor] = []
    surest = 0.0
    with eval_mode(model), torch.no_grad():
        for start in range(0, len(data), batch_size):
            places = list(range(start, min(start + batch_size, len(data))))
            batch = data.batch(places)
            heard, sure = _heard(model, batch, device)
            copies = [augment(batch, generator) for _ in range(2)] if augment is not None else []
            again = [_heard(model, one, device)[0] for one in copies]
            for number, place in enumerate(places):
                surest = max(surest, sure[number])
                agreed = len({tuple(texts[number]) for texts in again}) <= 1
                if heard[number] and sure[number] >= least and agreed:
                    kept.append(place)
                    labels.append(torch.tensor(heard[number], dtype=torch.long))
    if not kept:
        looser = "" if augment is None else ", leave agreement (augment) out"
        lower = f"Lower least (data.unlabelled.pseudo_labels.least){looser}, or give texts."
        lower = lower if least or augment else "Give texts."
        raise DataError(
            f"pseudo-labels: at least one of {counted(len(data), 'hypothesis')} must be left; the surest has a mean "
            f"posterior of {surest:.2f}, and least is {least:g}. {lower}"
        )
    return replace(data.take(kept), labels=tuple(labels), labelled=())


def _heard(model: nn.Module, batch: dict[str, Any], device: torch.device) -> tuple[list[list[int]], list[float]]:
    """Return the tokens heard in each utterance, and their mean posterior."""
    inputs, lengths = batch["inputs"].to(device), batch["lengths"].to(device)
    decodes = isinstance(unwrap(model), Decoder)
    outputs = answered(model, inputs, lengths, {}, {}) if decodes else model(inputs, lengths)
    recognizer = recognizer_of(outputs)
    return recognizer.hypotheses(outputs), recognizer.confidence(outputs).tolist()
