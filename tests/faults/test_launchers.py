"""Runs that torchrun and ``accelerate launch`` start: two processes, of which one speaks, and one may be lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conservtl import plugins
from conservtl.cli import _main
from conservtl.experiments.run.runner import run
from conservtl.experiments.spec.spec import load_spec

ROOT = Path(__file__).parents[2]
TASK = ROOT / "examples" / "extend" / "toy_task"
FIELDS = ("source.training.epochs=1", "data.source_hums=64", "training.optimizer=sgd", "training.lr=0.01")
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node=2")
ACCELERATE = ("accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1")

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without distributed"),
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo"),
]


def fields(folder: Path, epochs: int, world: int) -> list[str]:
    """Settings under which each step sees the same examples, whatever the number of processes."""
    sizes = (f"training.batch_size={20 // world}", f"source.training.batch_size={32 // world}")
    return [*FIELDS, *sizes, f"training.epochs={epochs}", f"training.evaluate_every={epochs}",
            f"source.cache={folder}/cache", "training.device=cpu", "source.training.device=cpu"]  # fmt: skip


def launched(folder: Path, launcher: tuple[str, ...], epochs: int) -> subprocess.Popen[str]:
    settings = [word for field in fields(folder, epochs, 2) for word in ("--set", field)]
    module = ["-m", *launcher, "-m", "conservtl", "run", f"{TASK}/spec.yaml", "--import", str(TASK)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, *module, "--out", str(folder / "out"), *settings],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )


def alone(folder: Path, epochs: int) -> Path:
    """Make the same run in this process."""
    plugins.import_modules([str(TASK)])
    run(load_spec(TASK / "spec.yaml", fields(folder, epochs, 1)), folder / "alone")
    return folder / "alone"


def assert_equal(one: Path, other: Path) -> None:
    first, second = (load_file(folder / "model.safetensors") for folder in (one, other))
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=0, atol=1e-5, msg=name)


def said(output: str) -> list[str]:
    """The lines that are neither the launcher's nor torch's own."""
    return [line for line in output.splitlines() if line.startswith("conservtl: ") or "Adapt" in line]


@pytest.mark.parametrize(
    "launcher",
    [pytest.param(TORCHRUN, id="torchrun"), pytest.param(ACCELERATE, id="accelerate", marks=pytest.mark.slow)],
)
def test_a_launched_run_is_that_of_one_process(tmp_path, launcher):
    process = launched(tmp_path, launcher, 5)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert len(said(output)) == 1, output
    assert output.count("report.html") == 1, "rank 0 alone prints"
    assert_equal(alone(tmp_path, 5), tmp_path / "out")


def children(launcher: int) -> dict[int, int]:
    """Rank -> id of the processes that a launcher has started."""
    found = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            names = (folder / "environ").read_text().split("\0") if parent == launcher else []
        except OSError:
            continue
        found |= {int(name.removeprefix("RANK=")): int(folder.name) for name in names if name.startswith("RANK=")}
    return found


def trains(folder: Path, process: subprocess.Popen[str]) -> None:
    """Wait until the run has finished some epochs and written a checkpoint."""
    history = folder / "out" / "history.jsonl"
    until = time.monotonic() + 120
    while not (folder / "out" / "checkpoint.pt").is_file() or history.read_text().count("\n") < 5:
        time.sleep(0.01)
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="reads /proc")
class TestLost:
    """A process of a run is killed, or its launcher is told to stop."""

    @pytest.mark.parametrize("rank", [0, 1])
    def test_the_others_stop_with_a_checkpoint(self, tmp_path, rank):
        process = launched(tmp_path, TORCHRUN, 150)
        trains(tmp_path, process)
        os.kill(children(process.pid)[rank], signal.SIGKILL)
        output, _ = process.communicate(timeout=60)
        assert process.returncode != 0
        assert [f"rank {rank} of 2 stopped" in line for line in said(output)] == [True], output
        plugins.import_modules([str(TASK)])
        run(load_spec(TASK / "spec.yaml", fields(tmp_path, 150, 2)), tmp_path / "out", resume=True)
        assert_equal(alone(tmp_path, 150), tmp_path / "out")

    @pytest.mark.parametrize("rank", [0, 1])
    def test_the_launcher_starts_them_anew_and_they_resume(self, tmp_path, rank):
        process = launched(tmp_path, (*TORCHRUN, "--max-restarts=1"), 150)
        trains(tmp_path, process)
        history, least = tmp_path / "out" / "history.jsonl", 5
        os.kill(children(process.pid)[rank], signal.SIGKILL)
        until = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < until:
            least = min(least, history.read_text().count("\n") if history.is_file() else 0)
            time.sleep(0.01)
        output, _ = process.communicate(timeout=1)
        assert process.returncode == 0, output
        assert output.count("report.html") == 1
        assert least == 5, "they began again"
        assert_equal(alone(tmp_path, 150), tmp_path / "out")

    def test_a_launcher_that_is_told_to_stop_leaves_a_checkpoint(self, tmp_path):
        process = launched(tmp_path, TORCHRUN, 150)
        trains(tmp_path, process)
        process.terminate()
        output, _ = process.communicate(timeout=60)
        assert ["interrupted" in line for line in said(output)] == [True], output
        assert (tmp_path / "out" / "checkpoint.pt").is_file()
        assert not (tmp_path / "out" / "model.safetensors").exists()


def test_the_first_process_alone_tells_of_a_wrong_command_line(monkeypatch, capsys):
    from conservtl.cli._main import app

    for rank in (0, 1):
        monkeypatch.setattr(_main, "_RANK", rank)
        assert _main._exit_code(lambda **options: app(["run", "--nonsense"], **options)) == 2
        assert ("--nonsense" in capsys.readouterr().err) == (rank == 0)
