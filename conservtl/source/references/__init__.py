"""Names of weights: one file for each kind."""

from __future__ import annotations

import re
from pathlib import Path

from conservtl.errors import SourceError, did_you_mean
from conservtl.source.references.hugging_face import HuggingFace
from conservtl.source.references.reference import Reference
from conservtl.source.references.timm_weights import TimmWeights
from conservtl.source.references.torchaudio_bundle import TorchaudioBundle
from conservtl.source.references.torchvision_weights import TorchvisionWeights
from conservtl.source.references.url import Url

__all__ = ["KINDS", "Reference", "is_name", "reference_of"]

KINDS: tuple[type[Reference], ...] = (TorchvisionWeights, TimmWeights, TorchaudioBundle, HuggingFace, Url)
"""All kinds, in the order in which they are asked."""

_BY_SCHEME = {scheme: kind for kind in KINDS for scheme in kind.schemes}
_SCHEME = re.compile(r"([A-Za-z][\w+.-]+):")  # one letter is a drive


def is_name(text: str) -> bool:
    """Return whether a text names weights instead of a path. A file of the same name wins, but over a known scheme."""
    if text.partition(":")[0] in _BY_SCHEME:
        return True
    return not _exists(text) and (_SCHEME.match(text) is not None or _kind_of_bare(text) is not None)


def reference_of(source: object) -> Reference | None:
    """Return the reference that a text or a library's object is; None for a path, a model or a state dict.

    Raises:
        SourceError: it looks like a name, and is none.
    """
    if not isinstance(source, str):
        return next((found for kind in KINDS if (found := kind.of(source)) is not None), None)
    if not is_name(source):
        return None
    scheme, colon, _ = source.partition(":")
    if not colon and (kind := _kind_of_bare(source)) is not None:
        return kind.parse(f"{kind.schemes[0]}:{source}")
    if scheme not in _BY_SCHEME:
        raise SourceError(
            f"source {source!r} is not a file, and {scheme!r} is no kind of name: {', '.join(_BY_SCHEME)} are."
            f"{did_you_mean(scheme, _BY_SCHEME)}"
        )
    return _BY_SCHEME[scheme].parse(source)


def _kind_of_bare(text: str) -> type[Reference] | None:
    return next((kind for kind in KINDS if kind.bare is not None and kind.bare.fullmatch(text)), None)


def _exists(text: str) -> bool:
    try:
        return Path(text).exists()
    except (OSError, ValueError):  # too long for a path
        return False
