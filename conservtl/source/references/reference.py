"""Weights by a name that a library or a server knows, instead of a path."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from torch import nn

__all__ = ["Reference"]


class Reference(ABC):
    """Base of the kinds of names. ``str(reference)`` is what a spec says.

    A subclass imports its library where it needs it, so that a spec with a name can be read without it.
    """

    schemes: ClassVar[tuple[str, ...]]
    """Beginnings of texts of this kind, before the first colon."""
    bare: ClassVar[re.Pattern[str] | None] = None
    """Texts of this kind without a scheme."""

    @classmethod
    @abstractmethod
    def parse(cls, text: str) -> Self:
        """Return the reference of a text that begins with one of the schemes; nothing is downloaded.

        Raises:
            SourceError: the text names nothing; the message says what is missing.
        """

    @classmethod
    def of(cls, source: object) -> Self | None:  # noqa: ARG003 - for kinds that have objects
        """Return the reference of a library's own object; None if it is not of this kind."""
        return None

    def pinned(self) -> Self:
        """Return the reference that names the same weights later and elsewhere too.

        Raises:
            SourceError: it can only be told with a network, and there is none.
        """
        return self

    @abstractmethod
    def read(self) -> Path | Mapping[str, Any] | nn.Module:
        """Return the weights on this machine, downloaded if need be.

        Raises:
            SourceError: they cannot be downloaded; the message names the file and where to put it.
            MissingExtraError: the library is not installed.
        """
