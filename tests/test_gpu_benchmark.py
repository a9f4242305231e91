"""The benchmark for GPUs runs where there is none, on a tiny network: every row is measured, none written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_every_row_is_measured(tmp_path):
    pytest.importorskip("torchvision")
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "gpu.py"),
        "--check",
        "--minutes",
        "0.002",
        "--only",
        "weights",
        "bus",
        "steps",
    ]
    done = subprocess.run(
        [*command, "--out", str(tmp_path)], capture_output=True, text=True, timeout=300, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [line.split("|")[1:-1] for line in done.stdout.splitlines() if line.startswith("| ")]
    assert [len(row) for row in rows] == [6] * 22 + [5] * (len(rows) - 22)
    assert {"LHUC, all else frozen", "Mixout", "coupled"} <= {row[0].strip() for row in rows}
    assert not list(tmp_path.iterdir())
