"""Kinds of recognizers: CTC, and sequence to sequence; a model's outputs say which it is."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from conservtl.errors import SpecError, counted
from conservtl.functions import IGNORED, logits_of
from conservtl.layers import unwrap
from conservtl.padding import padding_of_outputs
from conservtl.tasks.transcribe.decoding import check_frames, frames_of, tokens_of

__all__ = ["CTC", "Decoded", "Decoder", "Recognizer", "SequenceToSequence", "answered", "recognizer_of"]


@dataclass(frozen=True)
class Decoded:
    """Outputs of a decoder.

    Args:
        logits: (N, positions, tokens), the scores of each next token, and of the end behind the last.
        mask: (N, positions), false where padded.
        heard: (N, tokens) generated, -100 behind the end; None: none was.
        posteriors: (N,), the mean posterior of the tokens generated.
        encoded: outputs of the encoder, for ``generate``; None: they were not asked for.
    """

    logits: Tensor
    mask: Tensor
    heard: Tensor | None = None
    posteriors: Tensor | None = None
    encoded: Any = None
    blank: ClassVar[int | None] = None


@runtime_checkable
class Decoder(Protocol):
    """A model whose decoder reads the tokens before: it returns ``Decoded``.

    It is called with ``inputs``, ``lengths`` and the arguments that ``teacher`` returns. Without those its decoder
    reads the beginning alone, and there is one position.

    With an attribute ``keeps_encoded`` that is true, it also takes ``keep_encoded`` and then returns
    ``Decoded.encoded``, which ``generate`` takes as ``encoded``: its encoder runs once for the loss and the text. A
    ``generate`` that takes ``beams`` and ``length_penalty`` serves a beam search of ``data.decoding``.
    """

    def teacher(self, labels: Tensor) -> dict[str, Tensor]:
        """Return the arguments by which it reads texts, (N, tokens), negative where padded."""
        ...

    def generate(self, inputs: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``heard`` and ``posteriors``."""
        ...


def answered(
    model: nn.Module, inputs: Tensor, lengths: Tensor, taught: Mapping[str, Tensor], search: Mapping[str, Any]
) -> Decoded:
    """Return the outputs of a decoder, with the text that it generates.

    Raises:
        SpecError: its ``generate`` does not take them.
    """
    decoder: Any = unwrap(model)
    if unknown := [name for name in search if name not in inspect.signature(decoder.generate).parameters]:
        raise SpecError(
            f"data.decoding is a beam search, for which generate of {type(decoder).__name__} must take {unknown[0]}; "
            "it does not. Set it to greedy."
        )
    kept = {"keep_encoded": True} if getattr(decoder, "keeps_encoded", False) else {}
    outputs: Decoded = model(inputs=inputs, lengths=lengths, **taught, **kept)
    known = {} if outputs.encoded is None else {"encoded": outputs.encoded}
    heard, posteriors = decoder.generate(inputs, lengths, **known, **search)
    return replace(outputs, heard=heard, posteriors=posteriors, encoded=None)


class Recognizer(ABC):
    """How outputs of one kind of model are trained, compared and read."""

    @abstractmethod
    def fault(self, outputs: Any, tokens: int) -> str | None:
        """Return why outputs are not those of such a model with this many tokens, as "must ..."; None if they are."""

    @abstractmethod
    def loss(self, outputs: Any, batch: Any) -> Tensor:
        """Return the loss a token, the mean over the utterances."""

    @abstractmethod
    def positions(self, outputs: Any) -> tuple[Tensor, Tensor]:
        """Return logits (N, positions, tokens), and which positions count, (N, positions)."""

    @abstractmethod
    def rows(self, outputs: Any, chosen: Tensor) -> Any:
        """Return the outputs of some utterances, by a mask (N,)."""

    @abstractmethod
    def hypotheses(self, outputs: Any) -> list[list[int]]:
        """Return the tokens heard in each utterance."""

    @abstractmethod
    def confidence(self, outputs: Any) -> Tensor:
        """Return the mean posterior of the tokens heard, (N,); 0 where none is."""

    @abstractmethod
    def outputs_at(self, outputs: Any, places: Sequence[int]) -> Any:
        """Return the outputs of some tokens, in this order."""


class CTC(Recognizer):
    """Connectionist temporal classification: outputs are (logits, frames of each utterance), output 0 is the blank."""

    def fault(self, outputs: Any, tokens: int) -> str | None:
        """Return why outputs are no (logits, lengths); None if they are."""
        logits, padding = logits_of(outputs), padding_of_outputs(outputs)
        fix = "Return (logits, lengths), with logits of (N, frames, tokens) and the frames of each utterance, (N,)."
        if logits.ndim != 3:
            return f"must return logits of (N, frames, tokens); it returns {tuple(logits.shape)}. {fix}"
        if padding is None or padding.lengths.shape != logits.shape[:1]:
            received = counted(len(logits), "utterance")
            return f"must return the frames of each of {received} beside its logits; it does not. {fix}"
        if padding.lengths.is_floating_point():
            return f"must return lengths in frames; it returns {padding.lengths.tolist()}. {fix}"
        return _wrong_size(logits, tokens, "the blank")

    def loss(self, outputs: Any, batch: Any) -> Tensor:
        """Return the CTC loss a token, the mean over the utterances.

        Raises:
            DataError: a text needs more frames than its utterance has.
        """
        logits, lengths = frames_of(outputs)
        labels = batch["labels"]
        check_frames(lengths, labels, batch.get("names", ()), changed="draw" in batch)
        counts = (labels >= 0).sum(1)
        scores = logits.float().log_softmax(-1).transpose(0, 1)
        return F.ctc_loss(scores, labels.clamp_min(0), lengths.long(), counts, zero_infinity=False)

    def positions(self, outputs: Any) -> tuple[Tensor, Tensor]:
        """Return logits and valid frames."""
        logits, lengths = frames_of(outputs)
        return logits, torch.arange(logits.shape[1], device=logits.device) < lengths.unsqueeze(1)

    def rows(self, outputs: Any, chosen: Tensor) -> Any:
        """Return logits and frames of some utterances."""
        logits, lengths = frames_of(outputs)
        return logits[chosen], lengths[chosen]

    def hypotheses(self, outputs: Any) -> list[list[int]]:
        """Return the tokens of the best path: repeats merged, then blanks dropped."""
        logits, lengths = frames_of(outputs)
        best = logits.argmax(-1).cpu()
        paths = (torch.unique_consecutive(row[:length]) for row, length in zip(best, lengths.tolist(), strict=True))
        return [path[path > 0].tolist() for path in paths]

    def confidence(self, outputs: Any) -> Tensor:
        """Return the mean posterior of the best path over its frames that are no blank; 0 where all are blank."""
        logits, valid = self.positions(outputs)
        best, answers = logits.float().softmax(-1).max(-1)
        spoken = valid & (answers > 0)
        return torch.where(spoken, best, 0).sum(1) / spoken.sum(1).clamp_min(1)

    def outputs_at(self, outputs: Any, places: Sequence[int]) -> Any:
        """Return the logits of some tokens, with the frames of each utterance."""
        logits, lengths = frames_of(outputs)
        return logits[..., list(places)], lengths


class SequenceToSequence(Recognizer):
    r"""A decoder that reads the tokens before: outputs are ``Decoded``.

    The loss of an utterance with tokens :math:`y_1 \dots y_L` is

    .. math:: -\frac{1}{L + 1} \sum_{l=1}^{L+1} \log p(y_l \mid y_{<l}, x), \quad y_{L+1} = \text{end}

    Args:
        end: the token behind a text.
    """

    def __init__(self, end: int = 0) -> None:
        self._end = end

    def fault(self, outputs: Any, tokens: int) -> str | None:
        """Return why logits and mask do not fit each other or the tokens; None if they do."""
        logits, mask = outputs.logits, outputs.mask
        if logits.ndim != 3:
            return f"must return logits of (N, positions, tokens); it returns {tuple(logits.shape)}. Return those."
        if mask.dtype != torch.bool or mask.shape != logits.shape[:2]:
            return (
                f"must return a mask of booleans for its logits' {tuple(logits.shape[:2])} positions; it returns "
                f"{str(mask.dtype)[6:]} of {tuple(mask.shape)}. Return true for positions that count."
            )
        return _wrong_size(logits, tokens, "the end")

    def loss(self, outputs: Any, batch: Any) -> Tensor:
        """Return the cross-entropy a token, the end included, the mean over the utterances."""
        logits, labels = outputs.logits.float(), batch["labels"]
        targets = F.pad(labels, (0, 1), value=IGNORED)
        counts = (labels >= 0).sum(1)
        targets = targets.scatter(1, counts.unsqueeze(1), self._end)
        each = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=IGNORED, reduction="none")
        loss: Tensor = (each.sum(1) / (counts + 1)).mean()
        return loss

    def positions(self, outputs: Any) -> tuple[Tensor, Tensor]:
        """Return logits and the mask."""
        return outputs.logits, outputs.mask

    def rows(self, outputs: Any, chosen: Tensor) -> Any:
        """Return logits and mask of some utterances."""
        return Decoded(outputs.logits[chosen], outputs.mask[chosen])

    def hypotheses(self, outputs: Any) -> list[list[int]]:
        """Return the tokens that were generated."""
        return tokens_of(outputs.heard)

    def confidence(self, outputs: Any) -> Tensor:
        """Return the mean posterior of the tokens that were generated."""
        posteriors: Tensor = outputs.posteriors
        return posteriors

    def outputs_at(self, outputs: Any, places: Sequence[int]) -> Any:
        """Return the outputs with these tokens in this order; tokens heard beyond them get numbers behind them."""
        order, size = torch.tensor(list(places)), outputs.logits.shape[-1]
        numbers = torch.full((size,), len(order)).index_copy(0, order, torch.arange(len(order)))
        heard = outputs.heard
        if heard is not None:
            heard = torch.where(heard < 0, heard, numbers.to(heard.device)[heard.clamp_min(0)])
        return replace(outputs, logits=outputs.logits[..., order.to(outputs.logits.device)], heard=heard)


def _wrong_size(logits: Tensor, tokens: int, also: str) -> str | None:
    if logits.shape[2] == tokens:
        return None
    return (
        f"must have an output for each of {counted(tokens, 'token')}, {also} among them; it has {logits.shape[2]}. "
        "Leave the number of outputs out of the section model, or correct data.tokens."
    )


def recognizer_of(outputs: Any, end: int = 0) -> Recognizer:
    """Return the kind of recognizer of outputs: CTC unless they are ``Decoded``; ``end`` is its token behind a text."""
    return SequenceToSequence(end) if isinstance(outputs, Decoded) else CTC()
