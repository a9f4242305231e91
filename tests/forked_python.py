"""Commands of Python in forks of one process that has imported torch and conservtl, which takes seconds.

Each line of the standard input is a command as JSON: ``words`` after ``python``, ``folder``, ``environment``, ``out``
and ``err`` (files for what it prints). The answer is a line with its exit code. The process itself trains nothing:
torch cannot compute gradients in a fork of a process that has.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

MODULES = ("torch._dynamo", "accelerate", "conservtl.cli", "conservtl.experiments.run.runner", "conservtl.tasks.speech")
MODULES += ("conservtl.tasks.transcribe", "conservtl.tasks.vision", "matplotlib.figure")
"""What most commands need."""


def python(words: list[str]) -> None:
    """Do what ``python`` does with these words."""
    first, *rest = words
    if first == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    elif first == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path[0] = str(Path(first).parent)
        runpy.run_path(first, run_name="__main__")


def become(command: dict[str, Any]) -> None:
    """Let this process be the command."""
    os.chdir(command["folder"])
    os.environ.update(command["environment"])
    sys.path[0] = ""
    for stream, path in ((sys.stdout, command["out"]), (sys.stderr, command["err"])):
        handle = os.open(path, os.O_CREAT | os.O_WRONLY, 0o600)
        os.dup2(handle, stream.fileno())
        os.close(handle)
    python(command["words"])


def main() -> None:
    """Fork for each command, one after the other."""
    for module in MODULES:
        with suppress(ImportError):  # of an extra
            import_module(module)
    for line in sys.stdin:
        child = os.fork()
        if not child:
            become(json.loads(line))
            return
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)  # noqa: T201 - the answer


if __name__ == "__main__":
    main()
