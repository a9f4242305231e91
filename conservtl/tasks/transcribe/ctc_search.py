"""The beam search by CTC: torchaudio's decoder of flashlight-text, its lexicon and its language model."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from conservtl.errors import DataError
from conservtl.extras import require
from conservtl.tasks.bad_files import shown_name
from conservtl.tasks.transcribe.tokens import SPACE

__all__ = ["decoder", "ended", "inner", "libraries", "probability", "spellings"]

BEAM = 50
"""Hypotheses that are kept after each frame by default."""
_NEVER = -1e4  # log probability
_UNKNOWN = "<unk>"


def libraries() -> Any:
    """Return torchaudio's module of decoders; that of flashlight-text is there too."""
    require("flashlight.lib.text.decoder", "beam")
    return require("torchaudio.models.decoder", "beam")


def ended(scores: Tensor, vocabulary: Sequence[str]) -> Tensor:
    """Return the scores of frames with a last one that is a space, which ends the last word."""
    last = torch.full_like(scores[:1], _NEVER)
    last[:, vocabulary.index(SPACE)] = 0
    return torch.cat([scores, last])


def inner(path: Sequence[int], vocabulary: Sequence[str]) -> list[int]:
    """Return the tokens of a path without spaces at its ends."""
    spaces = [token for token, name in enumerate(vocabulary) if name == SPACE]
    inside = [place for place, token in enumerate(path) if token not in spaces]
    return list(path[inside[0] : inside[-1] + 1]) if inside else []


def probability(scores: Tensor, tokens: Sequence[int]) -> float:
    """Return p(tokens | frames) ** (1 / number of tokens)."""
    labels = torch.tensor([tokens], dtype=torch.long)
    count = torch.tensor([len(tokens)])
    loss = F.ctc_loss(scores.unsqueeze(1), labels, torch.tensor([len(scores)]), count, reduction="sum")
    return float((-loss / max(1, len(tokens))).exp())


@lru_cache(maxsize=4)
def decoder(beam: Any, vocabulary: tuple[str, ...], stamps: tuple[Any, ...]) -> Any:  # noqa: ARG001 - of the key
    """Return torchaudio's decoder; it takes log probabilities, (N, frames, tokens)."""
    library = libraries()
    lines = [] if beam.lexicon is None else spellings(beam.lexicon, vocabulary, whole=False)
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
                beam_size=beam.beam or BEAM,
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


def spellings(lexicon: Path, vocabulary: Sequence[str], *, whole: bool) -> list[list[str]]:
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


def _check_language_model(search: Any, beam: Any, words: Sequence[str]) -> None:
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
