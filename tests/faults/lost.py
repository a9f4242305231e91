"""Distributed runs of which a process is killed, raises, or receives a signal, beside one that nobody touches.

The processes are forked from this one, in which everything is imported already. ``python tests/faults/lost.py`` prints
a line of JSON: case -> exit codes, output, seconds until all had stopped, and how the run that went on ended.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kills import QUICK, TASK, end_of, same, start

from conservtl import plugins
from conservtl.cli import _main
from conservtl.experiments.run.runner import run
from conservtl.experiments.spec.spec import load_spec

FIELDS = (
    *QUICK,
    *("training.epochs=150", "training.evaluate_every=150", "training.optimizer=sgd", "training.lr=0.01"),
    *("source.training.epochs=2", "data.source_hums=64"),
)
CASES: dict[str, tuple[str, int, int | None]] = {  # how the model is shared, rank, signal (None: it raises)
    "the first replica is killed": ("ddp", 0, signal.SIGKILL),
    "a replica raises": ("ddp", 1, None),
    "a shard is killed": ("fsdp2", 1, signal.SIGKILL),
    "one replica is terminated": ("ddp", 1, signal.SIGTERM),
    "one shard is interrupted": ("fsdp2", 0, signal.SIGINT),
}


def free_port() -> int:
    """Return a port that nobody uses."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def processes(world: int, job: Callable[[], Any], output: Path) -> list[int]:
    """Start the processes of a run, as a launcher does."""
    port = free_port()

    def connected(rank: int) -> None:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "127.0.0.1"}
        _main._RANK, _main._WORLD = rank, world  # read when the module was imported
        code = _main._exit_code(lambda **_: job() and None)
        if code:
            raise SystemExit(code)

    return [start(lambda rank=rank: connected(rank), output) for rank in range(world)]


def case(folder: Path, how: str, rank: int, number: int | None) -> dict[str, Any]:
    """Stop one of two processes in the middle of a run, and let one process go on."""
    cache = f"source.cache={folder.parent}/cache"
    spec = load_spec(TASK / "spec.yaml", [*FIELDS, cache, f"training.distributed={how}"])
    out, output = folder / "out", folder / "output"
    folder.mkdir()

    def job() -> None:
        if number is None and os.environ["RANK"] == str(rank):
            spoil(40)
        run(spec, out)

    children = processes(2, job, output)
    while not (out / "checkpoint.pt").is_file() or (out / "history.jsonl").read_text().count("\n") < 5:
        time.sleep(0.01)
        if os.waitpid(children[0], os.WNOHANG)[0]:
            raise RuntimeError(output.read_text()[-2000:])
    begun = time.monotonic()
    if number is not None:
        os.kill(children[rank], number)
    codes = [end_of(child) for child in children]
    seconds = time.monotonic() - begun
    alone = load_spec(TASK / "spec.yaml", [*FIELDS, cache])
    code = end_of(start(lambda: run(alone, out, resume=True), folder / "rest"))
    text = (folder / "rest").read_text() if code else ""
    return {"codes": codes, "output": output.read_text(), "seconds": seconds, "resumed": code, "rest": text[-2000:]}


def spoil(step: int) -> None:
    """Let this process raise in a step of the run, as a user's own code may."""
    from conservtl.engine.session import Session

    made, plain = [0], Session.step

    def step_or_raise(self: Session, **options: bool) -> None:
        made[0] += 1
        if self.adaptation.plan.penalties and made[0] > step:
            raise OverflowError("a step of one's own")
        plain(self, **options)

    Session.step = step_or_raise  # type: ignore[method-assign]


def main() -> dict[str, Any]:
    """Make all cases; compare their ends with that of a run that nobody touched."""
    plugins.import_modules([str(TASK)])
    folder = Path(tempfile.mkdtemp())
    try:
        whole = folder / "whole"
        spec = load_spec(TASK / "spec.yaml", [*FIELDS, f"source.cache={folder}/cache"])
        if [end_of(child) for child in processes(2, lambda: run(spec, whole), folder / "output")] != [0, 0]:
            raise RuntimeError((folder / "output").read_text()[-2000:])
        found: dict[str, Any] = {"whole": {"output": (folder / "output").read_text()}}
        for number, (name, which) in enumerate(CASES.items()):
            found[name] = case(folder / str(number), *which)
            found[name]["difference"] = difference(whole, folder / str(number) / "out")
        return found
    finally:
        shutil.rmtree(folder)


def difference(one: Path, other: Path) -> float:
    """Return the largest difference between the weights of two runs; infinite if one has none."""
    from safetensors.torch import load_file

    files = [folder / "model.safetensors" for folder in (one, other)]
    if not all(file.is_file() for file in files):
        return float("inf")
    if same(*files):
        return 0.0
    first, second = map(load_file, files)
    return max(float((first[name] - second[name]).abs().max()) for name in first)


if __name__ == "__main__":
    print(json.dumps(main()))  # noqa: T201 - a script
