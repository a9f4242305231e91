"""The application with all its commands."""

from __future__ import annotations

import typer

from conservtl.cli import _advice, _ending, _runs, _studies

__all__ = ["app"]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # Rich's help gives flags a value: --resume <bool>
    help="Domain adaptation with regularized transfer.",
)
app.command()(_runs.plan)
app.command()(_runs.run)
app.command()(_runs.predict)
app.command()(_studies.compare)
app.command()(_studies.sweep)
app.command()(_studies.tune)
app.command()(_advice.recommend)
app.command("lr-find")(_advice.lr_find)
app.command()(_ending.merge)
app.command()(_ending.methods)
app.command()(_ending.push)
app.command()(_runs.schema)
