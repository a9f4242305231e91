"""A problem on its way to workers: written once to the study's folder, read once by each process."""

from __future__ import annotations

import hashlib
import pickle  # of a problem, sent from a study to its own workers # nosec B403
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from conservtl.errors import SpecError
from conservtl.experiments.studies.executors.work import dumps
from conservtl.storage.files import TEMPORARY, write_bytes

if TYPE_CHECKING:
    from conservtl.experiments.own.problem import OwnProblem

__all__ = ["read_sent", "sent"]

_DEPTH = 6  # attributes within each other that are looked into
_NOT_SENT = (
    "Leave out what belongs to this process alone, such as a lock, an open file or a connection: make it when it is "
    "first used, or drop it in __getstate__"
)


@contextmanager
def sent(problem: OwnProblem, folder: Path) -> Iterator[OwnProblem]:
    """Yield a problem that workers which see the folder can read, inside the block.

    The folder is locked by this study; what a killed one left there goes with its other temporary files.

    Raises:
        SpecError: a part of it cannot be pickled; the message names the part.
    """
    content = _packed(problem)
    digest = hashlib.sha256(content).hexdigest()
    path = folder.resolve() / f".{digest[:16]}{TEMPORARY}"
    write_bytes(content, path)
    try:
        yield replace(problem, file=(str(path), digest))
    finally:
        path.unlink(missing_ok=True)


def _packed(problem: OwnProblem) -> bytes:
    try:
        return dumps(problem)
    except Exception as error:
        part, reason = next(_unsendable(_parts(problem)), ("the problem", error))
        by_code = find_spec("cloudpickle") is not None
        fix = _NOT_SENT if by_code else "Define functions and classes at the top level of a module, install cloudpickle"
        raise SpecError(
            f"executor: workers get model, data and functions as pickles, and {part} cannot be pickled: "
            f"{str(reason).splitlines()[0]:.200}. {fix}, or leave executor and processes out."
        ) from error


def _unsendable(parts: Mapping[str, Any], depth: int = 0) -> Iterator[tuple[str, Exception]]:
    """Yield the names of what cannot be pickled, of the innermost attributes first, with the errors."""
    for name, part in parts.items():
        try:
            dumps(part)
        except Exception as error:  # noqa: BLE001 - of any class
            inner = {f"{name}.{key}": value for key, value in getattr(part, "__dict__", {}).items()}
            if isinstance(part, nn.Module):
                inner |= {f"{name}.{key}": value for key, value in part.named_children()}
                inner = {key: value for key, value in inner.items() if not key.endswith("._modules")}
            yield from _unsendable(inner, depth + 1) if depth < _DEPTH else ()
            yield name, error


def _parts(problem: OwnProblem) -> dict[str, Any]:
    """Return the parts of a problem by the names of the arguments that gave them."""
    functions, sets = problem.task.functions, problem.task.sets
    return {
        "model": problem.task.make.given,
        "source": problem.start,
        "train": sets.train,
        "held_out": [sets.test, sets.source_test],
        "valid": sets.valid,
        "source_data": sets.source_train,
        "forward": functions.forward,
        "loss": functions.loss,
        "metrics": functions.metrics,
        "augment": problem.task.augment,
        "proxies": problem.task.proxies,
        "optimizer": problem.optimizer,
        "example": problem.example,
    }


@lru_cache(maxsize=1)
def read_sent(path: str, digest: str) -> OwnProblem:
    """Return a problem that a study has written."""
    content = Path(path).read_bytes()
    if hashlib.sha256(content).hexdigest() != digest:
        raise SpecError(f"executor: {path!r} must be the file that the study wrote; it has changed. Repeat the call.")
    problem: OwnProblem = pickle.loads(content)  # noqa: S301 - compared with the study's digest # nosec B301
    return problem
