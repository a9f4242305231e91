"""Tokens of a pretrained model's own tokenizer, read from its folder by transformers."""

from __future__ import annotations

import base64
import io
import json
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from conservtl.errors import DataError, SpecError
from conservtl.extras import require
from conservtl.source.companions import companions
from conservtl.spec_model import FrozenModel

__all__ = ["TOKENIZER_FILES", "DecoderTokens", "Pretrained", "blank_first", "numbers_of"]

_CONFIG = "config.json"
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("merges.txt", "normalizer.json", "sentencepiece.bpe.model", "spiece.model", "tokenizer.model", "vocab.txt"),
)
"""Names of the files of a tokenizer, as save_pretrained writes them."""
_EMBEDDED = "zip:"
_DATE = (1980, 1, 1, 0, 0, 0)  # the same files give the same text
_MOST = 64 * 2**20  # bytes of an unpacked file


@dataclass(frozen=True)
class DecoderTokens:
    """Tokens by which a decoder begins and ends.

    Args:
        start: the tokens that it reads before a text.
        end: the token behind a text.
        silent: tokens that are no text, which it is not to write.
        pad: the token of padding; None: there is none.
    """

    start: tuple[int, ...] = (0,)
    end: int = 0
    silent: tuple[int, ...] = ()
    pad: int | None = None


class Pretrained(FrozenModel):
    """The tokenizer that a model of transformers was trained with. Its files are saved with the adapted network."""

    kind: Literal["pretrained"] = "pretrained"
    """The model's own."""
    folder: str = Field(min_length=1)
    """A folder as save_pretrained writes it, or `hf:ORG/NAME@REVISION`; in a saved run `zip:` and its files."""
    language: str | None = None
    """The language that a Whisper of many languages is told, such as `en`; null: the tokenizer's setting."""

    free_text: ClassVar[bool] = True
    """Whether a model may write texts that do not follow ``data.text``."""

    def embedded(self) -> Pretrained:
        """Return the tokenizer with its files in the place of the folder.

        Raises:
            DataError: the folder holds no tokenizer.
        """
        if self.folder.startswith(_EMBEDDED):
            return self
        files = companions(self.folder, (*TOKENIZER_FILES, _CONFIG))
        if not files.keys() - {_CONFIG}:
            raise DataError(
                f"data.tokens.folder {self.folder!r} must hold a tokenizer, such as tokenizer.json or vocab.json; it "
                "holds none. Give the folder of the model's processor, or other data.tokens."
            )
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as packed:
            for name, file in sorted(files.items()):
                packed.writestr(zipfile.ZipInfo(name, _DATE), file.read_bytes(), zipfile.ZIP_DEFLATED)
        return self.model_copy(update={"folder": _EMBEDDED + base64.b64encode(content.getvalue()).decode()})

    def vocabulary(self, texts: Iterable[str]) -> tuple[str, ...]:  # noqa: ARG002
        """Return the names of the outputs, in the model's order, but CTC's blank first."""
        return blank_first(self._read.names, self.blank)

    @property
    def order(self) -> tuple[str, ...] | None:
        """Names of the outputs in the model's order, where that is another."""
        names = self._read.names
        return None if self.vocabulary(()) == names else names

    @property
    def blank(self) -> str | None:
        """Name of CTC's blank, which a tokenizer of CTC calls padding; None: there is none."""
        name: str | None = self._read.tokenizer.pad_token
        return name if self._read.is_ctc else None

    @property
    def end(self) -> str | None:
        """Name of the token behind a text of a decoder; None: there is none."""
        name: str | None = self._read.tokenizer.eos_token
        return name

    def decoder(self) -> DecoderTokens:
        """Return the tokens by which a decoder begins and ends.

        Raises:
            SpecError: the tokenizer has no end of text.
        """
        tokenizer, config = self._read.tokenizer, self._read.config
        end = tokenizer.eos_token_id
        if end is None:
            raise SpecError("data.tokens: the tokenizer of a decoder must have an end of text; this one has none.")
        before = tuple(tokenizer.build_inputs_with_special_tokens([]))
        before = before[:-1] if before[-1:] == (end,) else before
        first = config.get("decoder_start_token_id")
        if first is None:
            first = before[0] if before else tokenizer.bos_token_id
        start = before if before[:1] == (first,) else (first, *before)
        marks = {number for number, name in enumerate(self._read.names) if name[:2] == "<|" and name[-2:] == "|>"}
        silent = (marks | {*tokenizer.all_special_ids} | self._read.unused) - {end}
        return DecoderTokens(start, end, tuple(sorted(silent)), tokenizer.pad_token_id)

    def encode(self, text: str, vocabulary: Sequence[str]) -> list[int]:
        """Return the tokens of a text.

        Raises:
            DataError: a part of it is unknown to the tokenizer.
        """
        tokenizer = self._read.tokenizer
        before = " " if hasattr(tokenizer, "set_prefix_tokens") else ""  # Whisper's texts begin with a space
        found = tokenizer(before + text, add_special_tokens=False).input_ids
        numbers = self._read.numbers if vocabulary is self._read.names else numbers_of(tuple(vocabulary))
        names = [self._read.names[one] for one in found]
        if tokenizer.unk_token_id in found or any(name not in numbers for name in names):
            raise DataError(
                f"has parts outside the tokenizer's vocabulary, in {text[:60]!r}. Change data.text, such as its case, "
                "or take another data.tokens."
            )
        return [numbers[name] for name in names]

    def decode(self, tokens: Sequence[int], vocabulary: Sequence[str]) -> str:
        """Return the text of tokens without blanks; special ones are left out."""
        read = self._read
        names = [vocabulary[one] for one in tokens if one < len(vocabulary)]
        found = [read.numbers[name] for name in names if name in read.numbers]
        options = {"group_tokens": False} if read.is_ctc else {}
        text = read.tokenizer.decode(found, skip_special_tokens=True, clean_up_tokenization_spaces=False, **options)
        return " ".join(text.split())

    @property
    def _read(self) -> _Tokenizer:
        return _read(self.embedded().folder, self.language)


@dataclass(frozen=True)
class _Tokenizer:
    """A tokenizer that was read.

    Args:
        tokenizer: of transformers.
        config: of the model beside it; empty: there is none.
        names: of all outputs, in order.
        numbers: name -> output.
        unused: outputs that the tokenizer does not have.
    """

    tokenizer: Any
    config: dict[str, Any]
    names: tuple[str, ...]
    numbers: dict[str, int]
    unused: frozenset[int]

    @property
    def is_ctc(self) -> bool:
        """Whether it is made for CTC: words are divided by a token."""
        return hasattr(self.tokenizer, "word_delimiter_token")


@lru_cache(maxsize=4)
def _read(embedded: str, language: str | None) -> _Tokenizer:
    """Read the files of a tokenizer. No code is taken from them.

    Raises:
        DataError: they are damaged, or none of a tokenizer; or the language is none of its.
        SpecError: it knows of no languages.
    """
    library = require("transformers", "transformers")
    try:
        with (
            tempfile.TemporaryDirectory() as folder,
            zipfile.ZipFile(io.BytesIO(base64.b64decode(embedded.removeprefix(_EMBEDDED)))) as packed,
        ):
            for one in packed.infolist():
                if one.filename in (*TOKENIZER_FILES, _CONFIG) and one.file_size < _MOST:
                    (Path(folder) / one.filename).write_bytes(packed.read(one))
            path = Path(folder) / _CONFIG
            config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
            tokenizer = library.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise DataError(
            f"data.tokens: the files of the tokenizer must be those of one that transformers knows; it says: "
            f"{' '.join(str(error).split())[:300]}. Save the processor again, or give other data.tokens."
        ) from error
    if language is not None and not hasattr(tokenizer, "set_prefix_tokens"):
        raise SpecError(
            f"data.tokens.language is for Whisper's tokenizers; received {language!r} for a "
            f"{type(tokenizer).__name__}. Leave it out."
        )
    if language is not None:
        try:
            tokenizer.set_prefix_tokens(language=language, task="transcribe", predict_timestamps=False)
        except ValueError as error:
            raise DataError(f"data.tokens.language: {error}") from error
    size = max(int(config.get("vocab_size") or 0), len(tokenizer))
    known = {number: name for name, number in tokenizer.get_vocab().items()}
    names = tuple(known.get(number, f"<unused {number}>") for number in range(size))
    numbers = {name: number for number, name in enumerate(names)}
    return _Tokenizer(tokenizer, config, names, numbers, frozenset(range(size)) - known.keys())


def blank_first(labels: tuple[str, ...], blank: str | None) -> tuple[str, ...]:
    """Return labels in their order, but the blank first, if it is one of them."""
    return (blank, *(label for label in labels if label != blank)) if blank in labels else labels


@lru_cache(maxsize=8)
def numbers_of(vocabulary: tuple[str, ...]) -> dict[str, int]:
    """Return the number of each token."""
    return {token: number for number, token in enumerate(vocabulary)}
