"""The exception tree. Messages say: subject, rule, value received, what to do."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

__all__ = [
    "ConservtlError",
    "DataError",
    "InputError",
    "LostWorkerError",
    "MemoryLimitError",
    "MissingExtraError",
    "OmissionWarning",
    "PlanError",
    "ProcessLostError",
    "SelectorError",
    "SourceError",
    "SpecError",
    "Terminated",
    "TrainingDivergedError",
    "WriteError",
    "agreeing",
    "counted",
    "did_you_mean",
    "hint",
    "joined",
    "listed",
    "plural",
    "wrong_tag",
]


_LISTED = 12  # words that a message lists
_PLURALS = {r"sis$": "ses", r"(s|x|tch|sh)$": r"\1es", r"([^aeiou])y$": r"\1ies"}  # ending -> of the plural
_VERBS = {"is": "are", "has": "have", "does": "do"}


class ConservtlError(Exception):
    """Base of every error that conservtl raises on purpose."""

    own: bool = False
    """Whether it is of this process of a distributed run alone, which then says so itself."""


class InputError(ConservtlError, ValueError):
    """An input is wrong and the caller can correct it (exit code 2)."""


class SpecError(InputError):
    """A field of a spec, or an argument, is wrong."""


class SelectorError(SpecError):
    """A name or glob matches nothing, or two match the same parameter."""


class PlanError(InputError):
    """Strategies contradict each other, or the plan breaks an invariant."""


class SourceError(InputError):
    """The source weights cannot be read, do not fit or are not finite."""


class DataError(InputError):
    """Recordings, images or labels are missing or contradict the spec."""


class MissingExtraError(ConservtlError, ImportError):
    """An optional dependency is missing; the message names the extra that installs it."""


class TrainingDivergedError(ConservtlError, RuntimeError):
    """The loss became NaN or infinite; the last good checkpoint is kept."""


class MemoryLimitError(ConservtlError, RuntimeError):
    """A training step does not fit into memory; the message names the batch size that would."""


class LostWorkerError(ConservtlError, RuntimeError):
    """A process that loads data, or again and again one that makes runs of a study, was lost; all finished is kept."""


class ProcessLostError(ConservtlError, RuntimeError):
    """Another process of a distributed run has stopped; those that are left stop too.

    Args:
        lost: ranks of the processes that do not answer.
        world: number of processes.
        first: the lowest rank that is left, which tells of it.
    """

    def __init__(self, lost: Sequence[int], world: int, *, first: int = 0) -> None:
        self.lost, self.world, self.first = tuple(lost), world, first
        names = ", ".join(map(str, lost))
        which = f"rank{'s' if len(lost) > 1 else ''} {names} of {world}" if lost else f"the connection of {world} ranks"
        super().__init__(
            f"{which} stopped, so the others stop too. Its own message, if it gave one, is above. Start again with "
            "resume, with as many processes or another number."
        )


class OmissionWarning(ConservtlError, UserWarning):  # noqa: N818 - it is a warning
    """A training loop of your own leaves out a part of the plan, or does it twice."""


class Terminated(SystemExit):
    """The process received SIGTERM; a run stops after its step, once a checkpoint is written (exit code 143)."""

    def __init__(self) -> None:
        super().__init__(143)


class WriteError(ConservtlError, OSError):
    """A file cannot be written: the disk is full, or the folder is read-only or gone. Earlier files are unchanged."""

    @classmethod
    def about(cls, path: object, error: BaseException) -> WriteError:
        """Return the error for a path and the exception that the attempt to write it raised."""
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        return cls(
            f"{str(path)!r} must be writable; received: {reason}. Earlier files are unchanged. Free space, or give a "
            "folder that can be written to."
        )


def counted(number: int, noun: str, verb: str = "", *, of: int | None = None) -> str:
    """Return a number with a noun, in the plural unless there is one, and a verb that agrees with the number.

    Args:
        number: how many.
        noun: in the singular.
        verb: in the singular; empty: none.
        of: how many there are in all; None: not said.

    >>> counted(1, "file"), counted(1200, "batch"), counted(2, "layer", "is")
    ('1 file', '1,200 batches', '2 layers are')
    >>> counted(1, "file", "does", of=3), counted(2, "hypothesis", "has", of=2)
    ('1 of 3 files does', '2 of 2 hypotheses have')
    """
    named = noun if (number if of is None else of) == 1 else plural(noun)
    said = (f"{number:,}", "" if of is None else f"of {of:,}", named, agreeing(number, verb))
    return " ".join(filter(None, said))


def agreeing(number: int, verb: str) -> str:
    """Return a verb in the singular, or in the plural unless there is one.

    >>> agreeing(1, "is"), agreeing(2, "is"), agreeing(2, "leaves")
    ('is', 'are', 'leave')
    """
    return verb if number == 1 else _VERBS.get(verb, verb.removesuffix("s"))


def plural(noun: str) -> str:
    """Return the plural of a noun.

    >>> plural("epoch"), plural("class"), plural("hypothesis"), plural("entry"), plural("day")
    ('epochs', 'classes', 'hypotheses', 'entries', 'days')
    """
    return next((re.sub(end, put, noun) for end, put in _PLURALS.items() if re.search(end, noun)), f"{noun}s")


def listed(names: Collection[str]) -> str:
    """Return names for a message, in quotes, the first of many; "none" without any."""
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return (", ".join(map(repr, list(names)[:_LISTED])) or "none") + more


def joined(names: Sequence[str]) -> str:
    """Return names as a sentence has them.

    >>> joined(["a"]), joined(["a", "b", "c"])
    ('a', 'a, b and c')
    """
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


def did_you_mean(word: str, known: Iterable[str], count: int = 1) -> str:
    """Return a sentence with the known words most like a misspelt one, whatever their case; empty if none is close.

    >>> did_you_mean("Shotz", ["shots", "seed"])
    " Did you mean 'shots'?"
    """
    originals = {each.lower(): each for each in known}
    close = [repr(originals[each]) for each in difflib.get_close_matches(word.lower(), originals, count)]
    return f" Did you mean {' or '.join(close)}?" if close else ""


def hint(word: str, known: Sequence[str], count: int = 1) -> str:
    """Return the sentence of ``did_you_mean``, or one that lists the first known words if none is close.

    >>> hint("alpha", ["shots", "seed"])
    ' There are shots, seed.'
    """
    first = ", ".join(known[:_LISTED]) + (", …" if len(known) > _LISTED else "")
    return did_you_mean(word, known, count) or (f" There are {first}." if known else "")


def wrong_tag(error: Mapping[str, Any], also: Sequence[str] = ()) -> str:
    """Return the message for a section of a spec whose kind is unknown."""
    tag = str(error["ctx"]["tag"])
    tag = tag if len(tag) <= 200 else f"{tag[:200]}…"
    known = [*(word.strip(" '") for word in str(error["ctx"]["expected_tags"]).split(",")), *also]
    return f"{tag!r} is none of {', '.join(known)}.{did_you_mean(tag, known)}"
