"""The application with all its commands, and its entry point: errors are one message, and set the exit code."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

import typer

from conservtl.cli import _advice, _ending, _runs, _studies
from conservtl.errors import ConservtlError, InputError, ProcessLostError, Terminated

__all__ = ["app", "main"]

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

_INTERRUPTED = "interrupted. To continue, repeat the command with the same --out (run: with --resume)."
_RANK, _WORLD = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))


def main() -> None:
    """Run the command line; exit codes: 0 done, 2 bad input, 1 other errors, 130 interrupted, 143 terminated.

    Of the processes that a launcher started, the first alone prints, but for errors of another's own.
    """
    command = next((word for word in sys.argv[1:] if not word.startswith("-")), "run")
    if _WORLD > 1 and command != "run":
        sys.exit(_fail(f"many processes share the command run; received {command!r}. Start it without a launcher.", 2))
    if _RANK > 0:
        warnings.simplefilter("ignore")  # the first process gives the same
    sys.exit(_exit_code(app))


def _exit_code(command: Callable[..., Any]) -> int:
    """Run a command; print what it raises as a message and return the exit code."""
    try:
        code = int(command(standalone_mode=False) or 0)
        return _fail(_INTERRUPTED, 130) if code == 130 else code  # some versions of typer return 130 for Ctrl-C
    except ProcessLostError as error:
        return _fail(str(error), 1, by=error.first)
    except ConservtlError as error:
        return _fail(str(error), 2 if isinstance(error, InputError) else 1, by=_RANK if error.own else 0)
    except Terminated:
        return _fail(_INTERRUPTED, 143)
    except (KeyboardInterrupt, typer.Abort):
        return _fail(_INTERRUPTED, 130)
    except Exception as error:
        show = getattr(error, "show", None)  # errors in the command line itself
        if show is None:
            raise
        if _RANK == 0:  # the others were given the same words
            show()
        return int(getattr(error, "exit_code", 2))


def _fail(message: str, code: int, *, by: int = 0) -> int:
    """Print a message, if this process is the one to say it, and return the exit code."""
    if by == _RANK:
        which = f"rank {_RANK}: " if _RANK else ""
        sys.stderr.write(f"conservtl: {which}{message}\n")
    return code
