"""Sentences of a small grammar: numbers, dates, times and commands, as texts without digits."""

from __future__ import annotations

import hashlib

from conservtl.tasks.transcribe.text import in_words

__all__ = ["sentences"]

_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
_MONTHS = (
    *("january", "february", "march", "april", "may", "june"),
    *("july", "august", "september", "october", "november", "december"),
)
_DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
_VERBS = ("turn on", "turn off", "open", "close", "check", "show me", "start", "stop")
_THINGS = ("lights", "door", "window", "heating", "music", "radio", "camera", "alarm", "fan", "oven")
_ROOMS = ("kitchen", "bedroom", "garden", "garage", "office", "hall")


class _Draws:
    """Numbers drawn from the hash of a name."""

    def __init__(self, name: str) -> None:
        self._name, self._count = name, 0

    def below(self, bound: int) -> int:
        self._count += 1
        digest = hashlib.sha256(f"{self._name}/{self._count}".encode()).digest()
        return int.from_bytes(digest[:6]) % bound

    def of(self, words: tuple[str, ...]) -> str:
        return words[self.below(len(words))]


def sentences(name: str, count: int) -> list[str]:
    """Return different sentences drawn from the hash of a name, the same in every run.

    Example:
        >>> sentences("source", 2) == sentences("source", 3)[:2]
        True
    """
    found: dict[str, None] = {}
    number = 0
    while len(found) < count:
        found[_sentence(_Draws(f"{name}/{number}"))] = None
        number += 1
    return list(found)


def _sentence(draw: _Draws) -> str:
    forms = (_number, _date, _time, _command, _call, _reminder)
    return forms[draw.below(len(forms))](draw)


def _below(draw: _Draws, bound: int) -> str:
    return in_words(draw.below(bound))


def _number(draw: _Draws) -> str:
    return f"{in_words(1 + draw.below(9))} hundred and {_below(draw, 100)}"


def _date(draw: _Draws) -> str:
    return f"{draw.of(_DAYS)} the {draw.of(_ORDINALS)} of {draw.of(_MONTHS)}"


def _time(draw: _Draws) -> str:
    part = ("in the morning", "in the evening", "at night")[draw.below(3)]
    return f"it's {_below(draw, 60)} past {in_words(1 + draw.below(12))} {part}"


def _command(draw: _Draws) -> str:
    return f"{draw.of(_VERBS)} the {draw.of(_THINGS)} in the {draw.of(_ROOMS)}"


def _call(draw: _Draws) -> str:
    return "call " + " ".join(_below(draw, 10) for _ in range(3 + draw.below(4)))


def _reminder(draw: _Draws) -> str:
    return f"set the {draw.of(_THINGS)} to {_below(draw, 100)} on {draw.of(_DAYS)}"
