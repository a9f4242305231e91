"""Tests in a forked process on a copy of the project in which one module is changed; used by ``mutants.py``."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

SECONDS_OF_A_TEST = 60  # of CPU time: then it does not end
MINUTES_OF_A_TEST = 10  # by the clock: then it waits for something that does not come
SECONDS_OF_A_PART = 40  # of CPU time for a part of a mutant's tests: after that no further test begins
CHECK = "tests/plan/test_decision.py"  # must pass without a change
# Imported once, before processes are forked: nothing of the project's own.
BEFOREHAND = (
    "accelerate", "hypothesis", "peft", "pydantic", "safetensors.torch", "scipy.stats", "timm", "torch._dynamo",
    "torchvision", "typer", "yaml",
)  # fmt: skip


class Copy:
    """A copy of the project, changed by one mutant after the other; PyTorch is imported once, here.

    Args:
        root: the project.
    """

    def __init__(self, root: Path) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="mutant")
        self.root = Path(self._folder.name) / "project"
        ignore = shutil.ignore_patterns(".git", ".*_cache", ".coverage*", ".hypothesis", "__pycache__", "runs")
        shutil.copytree(root, self.root, ignore=ignore, symlinks=True)
        self._log = Path(tempfile.gettempdir()) / "mutant.log"  # of the last tests that ran
        self._written = int(time.time())
        self._sound: set[str] = set()
        self._unsound: set[str] = set()
        torch.set_num_threads(1)
        for name in BEFOREHAND:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
        if not (told := self._tried([CHECK]))["passed"]:
            raise RuntimeError(f"{CHECK} must pass in a copy of the project; received {told}. See {self._log}.")

    def outcome(self, module: str, changed: str, parts: Sequence[Sequence[str]]) -> dict[str, Any]:
        """Return ``result``, ``by`` (the test that failed) and ``tests`` (how many ran), of one part after the other.

        A failure counts only if the test passes without the change.
        """
        original, ran = (self.root / module).read_text(encoding="utf-8"), 0
        for part in parts:
            by, more = self._killer(module, original, changed, part) if part else (None, 0)
            ran += more
            if by is not None:
                return {"result": "killed", "by": by, "tests": ran}
        return {"result": "survived", "by": None, "tests": ran}

    def _killer(self, module: str, original: str, changed: str, tests: Sequence[str]) -> tuple[str | None, int]:
        """Return the test that fails because of the change, if one does, and how many ran."""
        while True:
            self._write(module, changed)
            told = self._tried(tests)
            self._write(module, original)
            failed = told.get("failed")
            if failed is None:
                signalled = told.get("signal")
                return (None if signalled is None else f"{told.get('test')}, {signalled}"), told["passed"]
            if failed not in self._sound and "::" in failed:
                again = self._tried([failed])
                if "failed" in again or not again["passed"]:
                    self._unsound.add(failed.split("[")[0])  # with all its parameters
                    continue
                self._sound.add(failed)
            return failed, told["passed"] + 1

    def _write(self, module: str, text: str) -> None:
        """Write a module with a time of its own: compiled files know their source by its time in seconds."""
        path = self.root / module
        path.write_text(text, encoding="utf-8")
        self._written += 1
        os.utime(path, (self._written, self._written))

    def _tried(self, tests: Sequence[str]) -> dict[str, Any]:
        """Run tests in a forked process until one fails."""
        result = self.root.parent / "result.json"
        result.unlink(missing_ok=True)
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            self._child(tests, result)
        _, status = os.waitpid(child, 0)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # processes that a test started and left
        told = json.loads(result.read_text()) if result.exists() else {"passed": 0}
        if os.WIFSIGNALED(status):
            told["signal"] = signal.Signals(os.WTERMSIG(status)).name
        elif not told.get("ended"):
            told["signal"] = f"exit code {os.waitstatus_to_exitcode(status)}"
        return told

    def _child(self, tests: Sequence[str], result: Path) -> None:
        code = 1
        try:
            os.setsid()
            _limit()
            log = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.chdir(self.root)
            sys.path[0] = str(self.root)
            sys.dont_write_bytecode = False
            os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
            os.environ |= {"PYTHONPATH": str(self.root), "OMP_NUM_THREADS": "1"}
            chosen = [test for test in tests if (self.root / test.split("::")[0]).exists()]
            options = ["-q", "-x", "-p", "no:cacheprovider", "-Wignore::pytest.PytestAssertRewriteWarning"]
            options += [f"--deselect={test}" for test in self._unsound]
            code = int(pytest.main([*options, *chosen], plugins=[_Watch(result)]))
        except BaseException:  # noqa: BLE001 - to the log
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)


def _limit() -> None:
    """End this process after the time that a test may take from now."""
    end = int(time.process_time()) + SECONDS_OF_A_TEST
    resource.setrlimit(resource.RLIMIT_CPU, (end, resource.RLIM_INFINITY))
    signal.alarm(60 * MINUTES_OF_A_TEST)


class _Watch:
    """Plugin that notes what ran and failed, and limits the CPU time of each test and of all."""

    def __init__(self, result: Path) -> None:
        self._result, self._told = result, {"passed": 0}
        self._begun = time.process_time()

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if time.process_time() - self._begun > SECONDS_OF_A_PART:
            item.session.shouldstop = "enough"
        _limit()
        self._tell(test=item.nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._tell(failed=report.nodeid)
        elif report.when == "call" and report.passed:
            self._tell(passed=self._told["passed"] + 1)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._tell(failed=report.nodeid or "collection")

    def pytest_internalerror(self) -> None:
        self._tell(failed="pytest")

    def pytest_sessionfinish(self) -> None:
        self._tell(ended=True)

    def _tell(self, **news: Any) -> None:
        self._told |= news
        self._result.write_text(json.dumps(self._told))
