"""Texts from outputs: the best path or greedy tokens, or a beam search, by CTC with a lexicon and a language model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from conservtl.bounds import Count, Place, Positive
from conservtl.errors import DataError, counted
from conservtl.spec_model import FrozenModel
from conservtl.tasks.bad_files import shown_name
from conservtl.tasks.transcribe.ctc_search import decoder, ended, inner, libraries, probability, spellings
from conservtl.tasks.transcribe.decoding import frames_of
from conservtl.tasks.transcribe.recognizers import Decoded, recognizer_of
from conservtl.tasks.transcribe.tokens import SPACE, Tokenizer

__all__ = ["Beam", "Decoding", "Greedy"]

_LM_WEIGHT = 2.0
_BEAM = 5  # of a decoder


class Greedy(FrozenModel):
    """The most probable token in each frame of CTC, or at each step of a decoder."""

    kind: Literal["greedy"] = "greedy"
    """Greedy."""

    search: ClassVar[Mapping[str, Any]] = {}

    def check(self, tokens: Tokenizer, vocabulary: Sequence[str], *, whole: bool = True) -> None:
        """Accept every vocabulary."""

    def fault(self, outputs: Any) -> str | None:  # noqa: ARG002
        """Return None: every recognizer's outputs can be read."""
        return None

    def texts(self, outputs: Any, tokens: Tokenizer, vocabulary: Sequence[str]) -> list[tuple[str, float]]:
        """Return the text of each utterance, and the mean posterior of what was heard."""
        return _heard(outputs, tokens, vocabulary)


class Beam(FrozenModel):
    r"""Beam search over texts.

    By CTC, over texts with the sum of their paths (torchaudio's decoder of flashlight-text): for
    $\arg\max_y \log p(y \mid x) + \lambda \log_{10} p_{LM}(y) + \beta |y|$, with the CTC probability of the text $y$,
    its probability in the language model, and its number of words $|y|$. By a decoder (transformers' ``generate``), for
    $\arg\max_y \log p(y \mid x) / n^{\gamma}$ with $n$ tokens, the end among them.
    """

    kind: Literal["beam"] = "beam"
    """Beam search."""
    lexicon: Place | None = None
    """Text file of the possible words, one a line; after the word may stand its tokens, else it is spelled by its
    characters. null: every sequence of tokens is possible. Needs characters as tokens."""
    lm: Place | None = None
    """KenLM file, ARPA or binary: of words with a lexicon, else of tokens. null: no language model."""
    beam: Count | None = None
    """Hypotheses that are kept after each frame, or each token of a decoder. null: 50, or 5 of a decoder."""
    lm_weight: Positive = _LM_WEIGHT
    r"""$\lambda$: weight of the language model's log10 probabilities."""
    word_score: Annotated[float, Field(allow_inf_nan=False)] = 0.0
    r"""$\beta$: score of each word, with a lexicon. Positive values make more, shorter words."""

    length_penalty: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    r"""$\gamma$, of a decoder. Larger values make longer texts."""

    @model_validator(mode="after")
    def _used(self) -> Beam:
        if self.lm is None and self.lm_weight != _LM_WEIGHT:
            raise ValueError(f"lm_weight needs lm, a KenLM file; received {self.lm_weight:g} without. Give the file")
        if self.lexicon is None and self.word_score:
            raise ValueError(
                f"word_score needs lexicon, because there are no words without; received {self.word_score:g}. Give the "
                "file, or leave word_score out"
            )
        if (self.lexicon or self.lm) and self.length_penalty != 1:
            raise ValueError(
                f"length_penalty is for decoders, which take no lexicon and no lm; received {self.length_penalty:g} "
                "beside a file. Leave one of them out"
            )
        return self

    @property
    def search(self) -> Mapping[str, Any]:
        """Arguments of a decoder's ``generate``."""
        return {"beams": self.beam or _BEAM, "length_penalty": self.length_penalty}

    def check(self, tokens: Tokenizer, vocabulary: Sequence[str], *, whole: bool = True) -> None:
        """Raise unless the files exist and fit the tokens; without files there is nothing to check.

        Unless ``whole``, words of the lexicon may be spelled with other tokens: a source model with fewer tokens hears
        those words that it can spell.

        Raises:
            DataError: a file is missing, is no lexicon or language model, or does not fit the tokens.
            MissingExtraError: torchaudio or flashlight-text is not installed.
        """
        if self.lexicon is not None and (tokens.kind != "characters" or SPACE not in vocabulary):
            raise DataError(
                f"decoding.lexicon needs tokens with a space, as characters have it; data.tokens is {tokens.kind} with "
                f"{counted(len(vocabulary), 'token')}. Leave lexicon out; lm may be a language model of these tokens."
            )
        if self.lexicon is None and self.lm is None:
            return
        stamps = self._stamps()
        if self.lexicon is not None and whole:
            spellings(self.lexicon, vocabulary, whole=True)
        decoder(self, tuple(vocabulary), stamps)

    def fault(self, outputs: Any) -> str | None:
        """Return why outputs are not such as this search reads; None if they are.

        Raises:
            MissingExtraError: torchaudio or flashlight-text is not installed, and outputs are CTC's.
        """
        if isinstance(outputs, Decoded):
            field = "lexicon" if self.lexicon is not None else "lm" if self.lm is not None else None
            return field and (
                f"must be a recognizer by CTC, because data.decoding has {field}; it has a decoder. Leave {field} out."
            )
        if self.length_penalty != 1:
            return (
                "must have a decoder, because data.decoding has length_penalty; it is a recognizer by CTC. Leave "
                "length_penalty out."
            )
        libraries()
        return None

    def texts(self, outputs: Any, tokens: Tokenizer, vocabulary: Sequence[str]) -> list[tuple[str, float]]:
        """Return the best text of each utterance, and its CTC probability a token (geometric mean).

        Of a decoder the text that it generated, and the mean posterior of its tokens.
        """
        if isinstance(outputs, Decoded):
            return _heard(outputs, tokens, vocabulary)
        logits, lengths = frames_of(outputs)
        scores, frames = logits.float().log_softmax(-1)[..., : len(vocabulary)].cpu(), lengths.cpu()
        search = decoder(self, tuple(vocabulary), self._stamps())
        found = []
        for row, length in zip(scores, frames.tolist(), strict=True):
            spoken = row[:length]
            framed = spoken if self.lexicon is None else ended(spoken, vocabulary)
            best = search(framed.unsqueeze(0).contiguous())[0][0]
            path = best.tokens.tolist()
            text = tokens.decode(path, vocabulary) if self.lexicon is None else " ".join(best.words)
            found.append((text, probability(spoken, inner(path, vocabulary))))
        return found

    def _stamps(self) -> tuple[Any, ...]:
        """Return what tells whether the files have changed."""
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


def _heard(outputs: Any, tokens: Tokenizer, vocabulary: Sequence[str]) -> list[tuple[str, float]]:
    """Return the text of each utterance, and the mean posterior of what was heard."""
    recognizer = recognizer_of(outputs)
    texts = (tokens.decode(path, vocabulary) for path in recognizer.hypotheses(outputs))
    return list(zip(texts, recognizer.confidence(outputs).tolist(), strict=True))
