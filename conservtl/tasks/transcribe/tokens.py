"""Tokens of a text: characters, or the pieces of a sentencepiece model."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from conservtl.errors import DataError, SpecError
from conservtl.extras import require
from conservtl.spec_model import FrozenModel
from conservtl.tasks.transcribe.pretrained_tokens import DecoderTokens, Pretrained, numbers_of

__all__ = ["BLANK", "SPACE", "Characters", "Pretrained", "SentencePiece", "Tokenizer"]

BLANK = "<blank>"
"""Name of output 0, CTC's blank."""

SPACE = "|"
"""Name of the space among characters, as torchaudio and transformers write it."""
_UNKNOWN = "\ufffd"


class _OwnTokens(FrozenModel):
    """Base of tokens whose output 0 is no text: CTC's blank; a decoder's end, and what it reads first."""

    free_text: ClassVar[bool] = False
    space: ClassVar[str]
    """What stands for a space in the names of tokens."""

    order: ClassVar[None] = None
    """Outputs stand in the order of the vocabulary."""

    @property
    def blank(self) -> str:
        """Name of CTC's blank."""
        return BLANK

    @property
    def end(self) -> str:
        """Name of the token behind a text of a decoder."""
        return BLANK

    def decoder(self) -> DecoderTokens:
        """Return the tokens by which a decoder begins and ends."""
        return DecoderTokens()

    def decode(self, tokens: Sequence[int], vocabulary: Sequence[str]) -> str:
        """Return the text of tokens without blanks; U+FFFD for one that a smaller vocabulary does not have."""
        names = (vocabulary[token] if token < len(vocabulary) else _UNKNOWN for token in tokens)
        return " ".join("".join(names).replace(self.space, " ").split())


class Characters(_OwnTokens):
    """Each character is a token; the space is `|`."""

    kind: Literal["characters"] = "characters"
    """Characters."""
    alphabet: str | None = None
    """Characters in the order of the outputs after the blank, the space among them; null: those of all texts that are
    read, sorted."""
    space: ClassVar[str] = SPACE

    def embedded(self) -> Characters:
        """Return the same: there is no file."""
        return self

    def vocabulary(self, texts: Iterable[str]) -> tuple[str, ...]:
        """Return the names of the outputs, the blank first.

        Raises:
            SpecError: a character stands twice in ``alphabet``.
        """
        letters = (
            sorted({letter for text in texts for letter in text} | {" "}) if self.alphabet is None else self.alphabet
        )
        if twice := sorted({letter for letter in letters if list(letters).count(letter) > 1}):
            raise SpecError(f"data.tokens.alphabet must hold each character once; received {twice} twice. Remove one.")
        if "|" in letters:
            raise SpecError("data.tokens.alphabet must not hold '|', the name of the space. Write the space itself.")
        return (BLANK, *(SPACE if letter == " " else letter for letter in letters))

    def encode(self, text: str, vocabulary: Sequence[str]) -> list[int]:
        """Return the tokens of a text.

        Raises:
            DataError: a character is none of the vocabulary.
        """
        numbers = numbers_of(tuple(vocabulary))
        if unknown := sorted({letter for letter in text if (SPACE if letter == " " else letter) not in numbers}):
            raise DataError(
                f"has characters outside the vocabulary, {' '.join(map(ascii, unknown))}, in {text[:60]!r}. Change "
                "data.text, or add them to data.tokens.alphabet."
            )
        return [numbers[SPACE if letter == " " else letter] for letter in text]


class SentencePiece(_OwnTokens):
    """Pieces of a sentencepiece model. The model is saved with the adapted network."""

    kind: Literal["sentencepiece"] = "sentencepiece"
    """Pieces of words."""
    model: str = Field(min_length=1)
    """A `.model` file; in a saved run `base64:` and its bytes."""
    space: ClassVar[str] = "\u2581"

    def embedded(self) -> SentencePiece:
        """Return the tokenizer with its model's bytes in the place of the file.

        Raises:
            DataError: there is no such file.
        """
        if self.model.startswith("base64:"):
            return self
        try:
            content = Path(self.model).read_bytes()
        except OSError as error:
            raise DataError(
                f"data.tokens.model {self.model!r} cannot be read: {error.strerror}. Correct it."
            ) from error
        return SentencePiece(model="base64:" + base64.b64encode(content).decode())

    def vocabulary(self, texts: Iterable[str]) -> tuple[str, ...]:  # noqa: ARG002
        """Return the names of the outputs, the blank first."""
        processor = _processor(self.embedded().model)
        return (BLANK, *(processor.id_to_piece(number) for number in range(processor.get_piece_size())))

    def encode(self, text: str, vocabulary: Sequence[str]) -> list[int]:
        """Return the tokens of a text.

        Raises:
            DataError: a part of it is unknown to the model.
        """
        processor, numbers = _processor(self.embedded().model), numbers_of(tuple(vocabulary))
        pieces = processor.encode(text, out_type=str)
        if unknown := [piece for piece in pieces if numbers.get(piece, 1) == 1 + processor.unk_id()] or [
            piece for piece in pieces if piece not in numbers
        ]:
            raise DataError(
                f"has parts outside the vocabulary, {' '.join(map(ascii, unknown[:5]))}, in {text[:60]!r}. Change "
                "data.text, or take another data.tokens.model."
            )
        return [numbers[piece] for piece in pieces]


Tokenizer = Annotated[Characters | SentencePiece | Pretrained, Field(discriminator="kind")]
"""How a text becomes tokens."""


@lru_cache(maxsize=4)
def _processor(model: str) -> Any:
    library = require("sentencepiece", "transcribe")
    return library.SentencePieceProcessor(model_proto=base64.b64decode(model.removeprefix("base64:")))
