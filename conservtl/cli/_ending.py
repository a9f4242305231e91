"""Commands on finished models, and the list of methods: merge, methods, push."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from conservtl.cli._options import Imports

__all__ = ["merge", "methods", "push"]

Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result.")]


def merge(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="File, folder or name of the source's weights.", show_default=False)
    ],
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="Weights adapted from it.", show_default=False)
    ],
    out: Annotated[
        Path, typer.Option("--out", help="File *.safetensors, or folder with configuration too.", show_default=False)
    ],
    t: Annotated[
        float | None, typer.Option("--t", help="How far to go from the source: 0 the source, 1 the models' mean.")
    ] = None,
    method: Annotated[
        str, typer.Option("--method", help="interpolate (wise_ft), soup, model_stock, task_arithmetic or ties.")
    ] = "interpolate",
    density: Annotated[float, typer.Option("--density", help="Share of the values that ties keeps.")] = 0.2,
    batch_norm: Annotated[
        str, typer.Option("--batch-norm", help="Running statistics: interpolate, adapted or source.")
    ] = "interpolate",
    fresh: Annotated[
        list[str] | None,
        typer.Option("--fresh", metavar="GLOB", help="Tensors that are the first model's. Repeatable."),
    ] = None,
    key: Annotated[
        str | None,
        typer.Option("--key", help="Entry to take of each checkpoint that has it, such as ema."),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Mix a source's weights with those of models adapted from it, without training."""
    from conservtl.weights.merge import merge as merge_files

    statistics: Any = batch_norm  # merge checks it
    merged = merge_files(
        source,
        models,
        out,
        t=t,
        method=method,
        density=density,
        batch_norm=statistics,
        fresh=fresh or (),
        key=key,
        overwrite=overwrite,
    )
    sys.stdout.write(f"{merged}\n")


def methods(
    glob: Annotated[str, typer.Argument(metavar="[GLOB]", help="Names of strategies, such as '*_sp'.")] = "*",
    _imports: Imports = None,
) -> None:
    """Print each strategy with paper, cost, measured gain and when it hurts; one alone in full, with its fields."""
    from conservtl.report.text.catalogue import catalogue, full_text, short_text

    found = catalogue(glob)
    sys.stdout.write((full_text(found[0]) if len(found) == 1 else short_text(found)) + "\n")


def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="As a run or ctl.save wrote it.", show_default=False)],
    repository: Annotated[str, typer.Argument(metavar="ORG/NAME", help="On the Hugging Face Hub.", show_default=False)],
    public: Annotated[bool, typer.Option("--public", help="Let everyone see a new repository.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the files and send nothing.")] = False,
) -> None:
    """Upload a model and its card to the Hugging Face Hub, privately unless --public."""
    from conservtl.experiments.publishing.push import push as push_folder

    sys.stdout.write(f"{push_folder(folder, repository, public=public, dry_run=dry_run)}\n")
