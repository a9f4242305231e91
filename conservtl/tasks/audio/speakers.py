"""Names of speakers, and the checks that those a spec names are speakers of the data."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated
from unicodedata import normalize

from pydantic import AfterValidator

from conservtl.errors import DataError, did_you_mean, listed
from conservtl.tasks.bad_files import shown_name

__all__ = ["Text", "check_sources", "check_target"]

Text = Annotated[str, AfterValidator(lambda text: normalize("NFC", text))]
"""A word or a speaker; composed and decomposed letters are the same."""


def check_target(target: str, known: Collection[str], bad: Mapping[Path, str] | None = None) -> None:
    """Raise unless the target is a speaker of what can be used; all of it may be among what is bad -> why."""
    if target in known:
        return
    left = f" What cannot be used is not counted: {shown_name(min(bad))} {bad[min(bad)]}." if bad else ""
    raise DataError(
        f"data.target must be a speaker of the data; received {target!r}.{did_you_mean(target, known)} Choose one of: "
        f"{listed(sorted(known))}.{left}"
    )


def check_sources(named: Mapping[str, Collection[str]], target: str, known: Collection[str]) -> None:
    """Raise unless all that fields name -> speakers are speakers of the data other than the target."""
    others = sorted({*known} - {target})
    for name, speakers in named.items():
        if target in speakers:
            raise DataError(f"{name} must not contain data.target; received {target!r} in both. Remove it.")
        if missing := sorted({*speakers} - {*known}):
            choice = f"Choose from: {listed(others)}" if others else "The data has no other than data.target"
            raise DataError(f"{name} must be speakers of the data; received {listed(missing)}. {choice}.")
