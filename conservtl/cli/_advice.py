"""Commands that measure before training: recommend, lr-find."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from conservtl.cli._options import Imports, Overrides, SpecFile

__all__ = ["lr_find", "recommend"]


def recommend(
    spec: SpecFile,
    overrides: Overrides = None,
    _imports: Imports = None,
    write: Annotated[Path | None, typer.Option("--write", help="File for the recommended spec.")] = None,
) -> None:
    """Measure which strategies suit this data and print them with the reasons."""
    from conservtl.experiments.advice.recommendation import recommend as recommend_for
    from conservtl.experiments.spec.spec import load_spec

    recommendation = recommend_for(load_spec(spec, overrides or ()))
    sys.stdout.write(f"{recommendation}\n")
    if write is not None:
        recommendation.write(write)
        sys.stdout.write(f"{write}\n")


def lr_find(
    spec: SpecFile,
    overrides: Overrides = None,
    _imports: Imports = None,
    out: Annotated[Path | None, typer.Option("--out", help="File for the picture: .html or .png.")] = None,
) -> None:
    """Suggest a learning rate by a range test on a copy of the model."""
    from dataclasses import asdict

    from conservtl.experiments.advice.lr_range_test import lr_find_for as find
    from conservtl.experiments.spec.spec import load_spec
    from conservtl.report import check_picture, range_test_sentence, write_range_test

    if out is not None:
        check_picture(out)
    loaded = load_spec(spec, overrides or ())
    result = {**asdict(find(loaded)), "spec": loaded.model_dump(mode="json")}
    sys.stdout.write(range_test_sentence(result) + "\n")
    if out is not None:
        write_range_test(result, out)
        sys.stdout.write(f"{out}\n")
