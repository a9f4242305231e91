"""Texts from the outputs of a CTC model: the best path, or a beam search with a lexicon and a language model."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from conservtl.bounds import Count, Place, Positive
from conservtl.errors import DataError
from conservtl.extras import require
from conservtl.spec_model import FrozenModel
from conservtl.tasks.bad_files import shown_name
from conservtl.tasks.transcribe.decoding import frames_of
from conservtl.tasks.transcribe.recognizers import Decoded, recognizer_of
from conservtl.tasks.transcribe.tokens import SPACE, Tokenizer

__all__ = ["Beam", "Decoding", "Greedy"]

_NEVER = -1e4  # log probability
_UNKNOWN = "<unk>"
_LM_WEIGHT = 2.0


class Greedy(FrozenModel):
    """The most probable token in each frame of CTC, or at each step of a decoder."""

    kind: Literal["greedy"] = "greedy"
    """Greedy."""

    def check(self, tokens: Tokenizer, vocabulary: Sequence[str], *, whole: bool = True) -> None:
        """Accept every vocabulary."""

    def fault(self, outputs: Any) -> str | None:  # noqa: ARG002
        """Return None: every recognizer's outputs can be read."""
        return None

    def texts(self, outputs: Any, tokens: Tokenizer, vocabulary: Sequence[str]) -> list[tuple[str, float]]:
        """Return the text of each utterance, and the mean posterior of what was heard."""
        recognizer = recognizer_of(outputs)
        texts = (tokens.decode(path, vocabulary) for path in recognizer.hypotheses(outputs))
        return list(zip(texts, recognizer.confidence(outputs).tolist(), strict=True))


class Beam(FrozenModel):
    r"""Beam search over texts, each with the sum of its paths (torchaudio's decoder of flashlight-text).

    Searches for $\arg\max_y \log p(y \mid x) + \lambda \log_{10} p_{LM}(y) + \beta |y|$, with the CTC probability of
    the text $y$, its probability in the language model, and its number of words $|y|$.
    """

    kind: Literal["beam"] = "beam"
    """Beam search."""
    lexicon: Place | None = None
    """Text file of the possible words, one a line; after the word may stand its tokens, else it is spelled by its
    characters. null: every sequence of tokens is possible. Needs characters as tokens."""
    lm: Place | None = None
    """KenLM file, ARPA or binary: of words with a lexicon, else of tokens. null: no language model."""
    beam: Count = 50
    """Hypotheses that are kept after each frame."""
    lm_weight: Positive = _LM_WEIGHT
    r"""$\lambda$: weight of the language model's log10 probabilities."""
    word_score: Annotated[float, Field(allow_inf_nan=False)] = 0.0
    r"""$\beta$: score of each word, with a lexicon. Positive values make more, shorter words."""

    @model_validator(mode="after")
    def _used(self) -> Beam:
        if self.lm is None and self.lm_weight != _LM_WEIGHT:
            raise ValueError(f"lm_weight needs lm, a KenLM file; received {self.lm_weight:g} without. Give the file")
        if self.lexicon is None and self.word_score:
            raise ValueError(
                f"word_score needs lexicon, because there are no words without; received {self.word_score:g}. Give the "
                "file, or leave word_score out"
            )
        return self

    def check(self, tokens: Tokenizer, vocabulary: Sequence[str], *, whole: bool = True) -> None:
        """Raise unless the files exist and fit the tokens.

        Args:
            tokens: the tokenizer.
            vocabulary: names of the model's outputs.
            whole: whether every word of the lexicon must be spelled with these tokens. Else a source model with fewer
                tokens hears those words that it can spell.

        Raises:
            DataError: a file is missing, is no lexicon or language model, or does not fit the tokens.
            MissingExtraError: torchaudio or flashlight-text is not installed.
        """
        if self.lexicon is not None and (tokens.kind != "characters" or SPACE not in vocabulary):
            raise DataError(
                f"decoding.lexicon needs tokens with a space, as characters have it; data.tokens is {tokens.kind} with "
                f"{len(vocabulary)} tokens. Leave lexicon out; lm may be a language model of these tokens."
            )
        stamps = self._stamps()
        if self.lexicon is not None and whole:
            _spellings(self.lexicon, vocabulary, whole=True)
        _decoder(self, tuple(vocabulary), stamps)

    def fault(self, outputs: Any) -> str | None:
        """Return why outputs are not CTC's; None if they are."""
        if not isinstance(outputs, Decoded):
            return None
        return "must be a recognizer by CTC, because data.decoding is beam; it has a decoder. Set it to greedy."

    def texts(self, outputs: Any, tokens: Tokenizer, vocabulary: Sequence[str]) -> list[tuple[str, float]]:
        """Return the best text of each utterance, and its CTC probability a token (geometric mean)."""
        logits, lengths = frames_of(outputs)
        scores, frames = logits.float().log_softmax(-1)[..., : len(vocabulary)].cpu(), lengths.cpu()
        search = _decoder(self, tuple(vocabulary), self._stamps())
        found = []
        for row, length in zip(scores, frames.tolist(), strict=True):
            spoken = row[:length]
            framed = spoken if self.lexicon is None else _ended(spoken, vocabulary)
            best = search(framed.unsqueeze(0).contiguous())[0][0]
            path = best.tokens.tolist()
            text = tokens.decode(path, vocabulary) if self.lexicon is None else " ".join(best.words)
            found.append((text, _probability(spoken, _inner(path, vocabulary))))
        return found

    def _stamps(self) -> tuple[Any, ...]:
        """Return what tells whether the files have changed.

        Raises:
            DataError: there is no such file.
        """
        stamps = []
        for field in ("lexicon", "lm"):
            file = getattr(self, field)
            if file is not None and not file.is_file():
                raise DataError(
                    f"decoding.{field}: there is no file {shown_name(file)}. Correct the path, or decode with kind: "
                    "greedy."
                )
            stamps.append(None if file is None else (file.stat().st_mtime_ns, file.stat().st_size))
        return tuple(stamps)


Decoding = Annotated[Greedy | Beam, Field(discriminator="kind")]
"""How outputs become a text."""


def _ended(scores: Tensor, vocabulary: Sequence[str]) -> Tensor:
    """Return the scores of frames with a last one that is a space, which ends the last word."""
    last = torch.full_like(scores[:1], _NEVER)
    last[:, vocabulary.index(SPACE)] = 0
    return torch.cat([scores, last])


def _inner(path: Sequence[int], vocabulary: Sequence[str]) -> list[int]:
    """Return the tokens of a path without spaces at its ends."""
    spaces = [token for token, name in enumerate(vocabulary) if name == SPACE]
    inside = [place for place, token in enumerate(path) if token not in spaces]
    return list(path[inside[0] : inside[-1] + 1]) if inside else []


def _probability(scores: Tensor, tokens: Sequence[int]) -> float:
    """Return p(tokens | frames) ** (1 / number of tokens)."""
    labels = torch.tensor([tokens], dtype=torch.long)
    count = torch.tensor([len(tokens)])
    loss = F.ctc_loss(scores.unsqueeze(1), labels, torch.tensor([len(scores)]), count, reduction="sum")
    return float((-loss / max(1, len(tokens))).exp())


@lru_cache(maxsize=4)
def _decoder(beam: Beam, vocabulary: tuple[str, ...], stamps: tuple[Any, ...]) -> Any:  # noqa: ARG001 - of the key
    """Return torchaudio's decoder; it takes log probabilities, (N, frames, tokens)."""
    require("flashlight.lib.text.decoder", "beam")
    library = require("torchaudio.models.decoder", "beam")
    lines = [] if beam.lexicon is None else _spellings(beam.lexicon, vocabulary, whole=False)
    with tempfile.TemporaryDirectory() as folder:  # flashlight-text reads files only
        spelled, numbers = Path(folder) / "lexicon.txt", Path(folder) / "numbers.txt"
        spelled.write_text("".join(f"{' '.join(line)}\n" for line in lines), encoding="utf-8")
        # Without a list of its own the decoder asks a language model of tokens by numbers in another order.
        numbers.write_text("".join(f"{token}\n" for token in dict.fromkeys((*vocabulary, _UNKNOWN))), encoding="utf-8")
        try:
            search = library.ctc_decoder(
                lexicon=str(spelled) if lines else None,
                tokens=list(vocabulary),
                lm=None if beam.lm is None else str(beam.lm),
                lm_dict=None if lines or beam.lm is None else str(numbers),
                beam_size=beam.beam,
                lm_weight=beam.lm_weight,
                word_score=beam.word_score,
                log_add=True,
                blank_token=vocabulary[0],
                sil_token=SPACE if lines else vocabulary[0],  # a blank at both ends of a path changes no text
                unk_word=_UNKNOWN,
            )
        except (RuntimeError, ValueError) as error:
            raise DataError(
                f"decoding.lm: {shown_name(beam.lm)} cannot be read as a KenLM file: {str(error).splitlines()[-1]} "
                "Give an ARPA file or a binary one of KenLM, of two or more words in a row."
            ) from error
    if beam.lm is not None:
        _check_language_model(search, beam, [line[0] for line in lines] or vocabulary[1:])
    return search


def _spellings(lexicon: Path, vocabulary: Sequence[str], *, whole: bool) -> list[list[str]]:
    """Return each word of a lexicon with its tokens, a space at the end.

    Raises:
        DataError: the file cannot be read, has no words, or one with characters that are no tokens, if ``whole``.
    """
    try:
        lines = lexicon.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"decoding.lexicon: {shown_name(lexicon)} cannot be read as UTF-8 text: {error}.") from error
    letters, found = sorted({*vocabulary[1:]} - {SPACE}), []
    for number, line in enumerate(lines, 1):
        word, *spelling = line.split() or [""]
        if not word:
            continue
        spelling = spelling or list(word)
        spelling = spelling[:-1] if spelling[-1] == SPACE else spelling
        if unknown := [token for token in spelling if token not in letters] or [""] * (not spelling):
            if not whole:
                continue
            raise DataError(
                f"decoding.lexicon: {shown_name(lexicon)}, line {number}: a word must be spelled with the model's "
                f"tokens; {word!r} has {', '.join(map(repr, unknown))}. Spell it with: {' '.join(letters)}."
            )
        found.append([word, *spelling, SPACE])
    if not found:
        raise DataError(
            f"decoding.lexicon: {shown_name(lexicon)} has no words that can be spelled with "
            f"{' '.join(letters)}. Write one a line."
        )
    return found


def _check_language_model(search: Any, beam: Beam, words: Sequence[str]) -> None:
    """Raise if the language model knows none of the lexicon's words, or less than half of the tokens."""
    start = search.lm.start(False)
    unknown = search.lm.score(start, search.word_dict.get_index(_UNKNOWN))[1]
    known = sum(search.lm.score(start, search.word_dict.get_index(word))[1] != unknown for word in words)
    if known and (beam.lexicon is not None or 2 * known >= len(words)):
        return
    of, fix = (
        ("tokens", "Give one of tokens, or a lexicon if it is one of words")
        if beam.lexicon is None
        else ("words of decoding.lexicon", "Give one of these words, in the same case")
    )
    raise DataError(
        f"decoding.lm: {shown_name(beam.lm)} must be a language model of the {of}; it knows {known} of {len(words)}. "
        f"{fix}."
    )
