"""Texts as a recognizer learns and is judged by: explicit rules, saved with the model."""

from __future__ import annotations

import re
from typing import Literal
from unicodedata import category, normalize

from conservtl.spec_model import FrozenModel

__all__ = ["Normalisation", "in_words"]

_APOSTROPHES = str.maketrans(dict.fromkeys("\u2019\u2018\u02bc\uff07`\u00b4", "'"))
_UNSEEN = ("Cc", "Cf")  # control characters, soft hyphens, spaces of no width
_JOINERS = "\u200c\u200d"  # letters of Persian and of Indic scripts depend on them
_ONES = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_SCALES = ((10**9, "billion"), (10**6, "million"), (1000, "thousand"))
_IRREGULAR = {"one": "first", "two": "second", "three": "third", "five": "fifth", "eight": "eighth", "nine": "ninth"}
_ORDINALS = _IRREGULAR | {"twelve": "twelfth"}
_WHOLE = r"\d{1,3}(?:,\d{3})+(?!\d)|\d+"
_NUMBER = re.compile(_WHOLE)
_ORDINAL = re.compile(rf"\b({_WHOLE})(?:st|nd|rd|th)\b", re.IGNORECASE)
_DECIMAL = re.compile(rf"(?<![\d.])({_WHOLE})\.(\d+)(?!\.?\d)")
_MOST_DIGITS = 12  # longer numbers are read digit by digit


class Normalisation(FrozenModel):
    r"""Rules for texts of training and scoring. The result is in NFC, with single spaces and no unseen characters.

    Example:
        >>> Normalisation()("\u201cIt\u2019s 42!\u201d  she said.")
        "it's forty two she said"
    """

    case: Literal["lower", "upper", "keep"] = "lower"
    """Case of all letters."""
    punctuation: Literal["remove", "keep"] = "remove"
    """Whether to replace punctuation and symbols by spaces; apostrophes within words are letters."""
    numbers: Literal["words", "digits", "keep"] = "words"
    """`words`: English words for numbers, `3rd` and `2.5` among them; `digits`: digits with spaces between them;
    `keep`: as written."""
    apostrophes: Literal["keep", "remove"] = "keep"
    """Apostrophes within words, typographic ones as `'`."""

    def __call__(self, text: str) -> str:
        """Return the text by these rules."""
        text = normalize("NFC", text).translate(_APOSTROPHES)
        text = "".join(
            letter for letter in text if letter.isspace() or letter in _JOINERS or category(letter) not in _UNSEEN
        )
        if self.numbers == "words":
            text = _DECIMAL.sub(lambda match: f"{match[1]} point {' '.join(match[2])} ", text)
            text = _ORDINAL.sub(lambda match: f" {_ordinal(self._number(match[1].replace(',', '')))} ", text)
        if self.numbers != "keep":
            text = _NUMBER.sub(lambda match: f" {self._number(match[0].replace(',', ''))} ", text)
        if self.apostrophes == "remove":
            text = text.replace("'", "")
        if self.punctuation == "remove":
            text = "".join(" " if _is_punctuation(letter) else letter for letter in text)
            text = re.sub(r"(?<!\w)'+|'+(?!\w)", " ", text)  # quotation marks
        if self.case != "keep":
            text = text.lower() if self.case == "lower" else text.upper()
        return normalize("NFC", " ".join(text.split()))

    def _number(self, digits: str) -> str:
        if self.numbers == "digits":
            return " ".join(digits)
        if len(digits) > _MOST_DIGITS or (len(digits) > 1 and digits[0] == "0"):
            return " ".join(_ONES[int(digit)] for digit in digits)
        return in_words(int(digits))


def in_words(number: int) -> str:
    """Return a whole number below 10^12 in English words.

    >>> in_words(1_205), in_words(0)
    ('one thousand two hundred five', 'zero')
    """
    for scale, name in _SCALES:
        if number >= scale:
            rest = number % scale
            return f"{in_words(number // scale)} {name}" + (f" {in_words(rest)}" if rest else "")
    if number >= 100:
        return f"{_ONES[number // 100]} hundred" + (f" {in_words(number % 100)}" if number % 100 else "")
    if number < len(_ONES):
        return _ONES[number]
    return _TENS[number // 10 - 2] + (f" {_ONES[number % 10]}" if number % 10 else "")


def _ordinal(words: str) -> str:
    """Return the ordinal of a number in words: "twenty one" -> "twenty first"."""
    before, _, last = words.rpartition(" ")
    return f"{before} {_ORDINALS.get(last, f'{last}th'.replace('yth', 'ieth'))}"


def _is_punctuation(letter: str) -> bool:
    return letter != "'" and category(letter)[0] in "PS"
