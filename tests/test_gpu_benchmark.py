"""The benchmark for GPUs runs where there is none, on a tiny network: every row is measured, none written."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def rows_of(python, tmp_path, *parts):
    """Return the cells of all rows of the tables that these parts print."""
    pytest.importorskip("torchvision")
    words = ("--check", "--minutes", 0.002, "--only", *parts, "--out", tmp_path)
    done = python(ROOT / "benchmarks" / "gpu.py", *words)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not list(tmp_path.iterdir())
    return [line.split("|")[1:-1] for line in done.stdout.splitlines() if line.startswith("| ")]


def test_every_row_is_measured(python, tmp_path):
    rows = rows_of(python, tmp_path, "weights", "bus", "steps")
    assert [len(row) for row in rows] == [6] * 22 + [5] * (len(rows) - 22)
    assert {"LHUC, all else frozen", "Mixout", "coupled"} <= {row[0].strip() for row in rows}


@pytest.mark.slow
def test_the_engine_is_compared_with_other_loops(python, tmp_path):
    rows = rows_of(python, tmp_path, "engine")
    assert {len(row) for row in rows} == {7}
    compared = {row[0].strip(): row[3].strip() for row in rows}
    assert compared["fit, held"] == "by hand, channels-last and fused"
    assert compared["fit, held, L2SP"] == "fit, held"
    assert "fit, a DataLoader" in compared


@pytest.mark.slow
def test_recipes_are_run_on_each_device(python, tmp_path):
    rows = rows_of(python, tmp_path, "recipes")
    assert [row[:2] for row in rows[2:]] == [[" speaker ", " target "], [" speaker ", " source "]]
