"""One thread a test process, no GPU but for tests that want one, and a small world: three speakers who hum three words.

Tests mean the CPU, whose results are the same everywhere, unless they carry the marker ``gpu`` or take the fixture
``device``: where there is a GPU it is hidden from all others, and from the processes that they start.
"""

import gc
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.multiprocessing

torch.set_num_threads(1)  # the models here are so small that a second thread only waits

ROOT = Path(__file__).parents[1]
WORDS = ("0", "1", "2")
PITCH = {"anna": 1.0, "ben": 0.9, "cleo": 1.25}


GPUS = torch.cuda.device_count()
_VISIBLE = os.environ.get("CUDA_VISIBLE_DEVICES")
if GPUS:
    torch.cuda.init()  # before the environment hides it: CUDA reads it once a process


def _show(count: int) -> None:
    """Let torch and processes that are started see a number of GPUs."""
    torch.cuda.is_available = lambda: count > 0
    torch.cuda.device_count = lambda: count
    if count and _VISIBLE is None:
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = _VISIBLE or "" if count else ""


if GPUS:
    _show(0)  # also while files are imported and other fixtures made


@pytest.fixture(autouse=True)
def _gpu(request: pytest.FixtureRequest) -> Iterator[None]:
    """Show the GPU to tests with the marker ``gpu``, which are skipped where there is none."""
    if request.node.get_closest_marker("gpu") is None:
        yield
        return
    if not GPUS:
        pytest.skip("needs a CUDA device")
    _show(GPUS)
    yield
    _show(0)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, _gpu: None) -> torch.device:
    """Each device that is present: for tests of what holds on any."""
    return torch.device(request.param)


def pytest_collection_finish() -> None:
    """Let later collections of garbage pass over all that imports have made, which takes a fifth of a second each."""
    gc.collect()
    gc.freeze()


class ForkedPython:
    """Python for commands that need a process of their own: a fork of one that has imported conservtl already.

    Args:
        folder: temporary files, for what the commands print.
    """

    def __init__(self, folder: Path) -> None:
        self._files = (folder / str(number) for number in itertools.count())
        self._process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "forked_python.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            text=True,
        )

    def __call__(self, *words: object, folder: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run ``python *words`` in a folder, with more names in its environment."""
        out, err = next(self._files), next(self._files)
        command = {"words": list(map(str, words)), "folder": str(folder), "environment": environment}
        print(json.dumps({**command, "out": str(out), "err": str(err)}), file=self._process.stdin, flush=True)
        code = int(self._process.stdout.readline())
        return subprocess.CompletedProcess(command["words"], code, out.read_text(), err.read_text())

    def close(self) -> None:
        self._process.communicate()


@pytest.fixture(scope="session")
def python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkedPython]:
    """Run a command of Python in a process that knows nothing of other tests."""
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    made = ForkedPython(tmp_path_factory.mktemp("printed"))
    yield made
    made.close()


@pytest.fixture(scope="session")
def side_by_side() -> Callable[..., None]:
    """Run ``function(rank, *arguments)`` in processes forked from one that has imported what they need."""
    modules = ["conservtl.adaptation", "torch._dynamo", "accelerate", "torch.distributed.fsdp"]
    multiprocessing.set_forkserver_preload(modules)

    def run(function: Callable[..., None], arguments: tuple[object, ...], count: int = 2) -> None:
        torch.multiprocessing.start_processes(function, arguments, count, start_method="forkserver")

    return run


@pytest.fixture(scope="session")
def humming(tmp_path_factory: pytest.TempPathFactory) -> Path:
    soundfile = pytest.importorskip("soundfile")
    root = tmp_path_factory.mktemp("humming")
    generator = torch.Generator().manual_seed(0)
    seconds = torch.arange(4000) / 8000
    for speaker, pitch in PITCH.items():
        for number, word in enumerate(WORDS):
            for take in range(8):
                tone = torch.sin(2 * math.pi * 300 * 2**number * pitch * seconds * (1 + 0.01 * take))
                noise = 0.05 * torch.randn(4000, generator=generator)
                soundfile.write(root / f"{word}_{speaker}_{take}.wav", (0.3 * tone + noise).numpy(), 8000)
    return root


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of source models for all tests: each is trained once."""
    return tmp_path_factory.mktemp("sources")


@pytest.fixture
def untrained(speech_fields: dict, tmp_path: Path) -> dict:
    """The spec ``speech_fields``, whose source model is not trained yet."""
    return {**speech_fields, "source": {**speech_fields["source"], "cache": str(tmp_path / "cache")}}


@pytest.fixture
def speech_fields(humming: Path, sources: Path) -> dict:
    """A spec of a run that takes a second or two."""
    return {
        "task": "speech",
        "data": {"kind": "folder", "root": str(humming), "target": "cleo", "shots": 2},
        "source": {
            "training": {"device": "cpu", "epochs": 3, "lr": 3e-3, "evaluate_every": 100},
            "cache": str(sources),
        },
        "strategies": [{"kind": "l2_sp", "mode": "decoupled"}],
        "training": {"device": "cpu", "epochs": 3, "lr": 1e-3},  # compared with what a CPU computes
    }


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this source tree."""
    if importlib.util.find_spec("hatchling") is None:
        pytest.skip("hatchling is not installed, so no wheel can be built")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True, timeout=300)
    (found,) = folder.glob("conservtl-*.whl")
    return found
