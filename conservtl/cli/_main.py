"""The entry point: runs a command, prints errors as one message, sets the exit code."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import typer

from conservtl.cli._app import app
from conservtl.errors import ConservtlError, InputError, Terminated

__all__ = ["main"]

_INTERRUPTED = "interrupted. To continue, repeat the command with the same --out (run: with --resume)."


def main() -> None:
    """Run the command line; exit codes: 0 done, 2 bad input, 1 other errors, 130 interrupted, 143 terminated."""
    sys.exit(_exit_code(app))


def _exit_code(command: Callable[..., Any]) -> int:
    """Run a command; print what it raises as a message and return the exit code."""
    try:
        code = int(command(standalone_mode=False) or 0)
        return _fail(_INTERRUPTED, 130) if code == 130 else code  # some versions of typer return 130 for Ctrl-C
    except InputError as error:
        return _fail(str(error), 2)
    except ConservtlError as error:
        return _fail(str(error), 1)
    except Terminated:
        return _fail(_INTERRUPTED, 143)
    except (KeyboardInterrupt, typer.Abort):
        return _fail(_INTERRUPTED, 130)
    except Exception as error:
        show = getattr(error, "show", None)  # errors in the command line itself
        if show is None:
            raise
        show()
        return int(getattr(error, "exit_code", 2))


def _fail(message: str, code: int) -> int:
    sys.stderr.write(f"conservtl: {message}\n")
    return code
