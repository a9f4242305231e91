"""The benchmark for GPUs runs where there is none, on a tiny network: every row is measured, none written."""

from __future__ import annotations

import importlib
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


@pytest.fixture
def reports(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("gpu_report")


MACHINE = {"gpu": "a card", "versions": {"torch": "2"}, "date": "today"}
BUS = {"copy ms": 1.0, "rows": {"coupled": {"ms": 2.0, "of the copy": None, "waits": "no"}}}


def test_a_failure_is_named_and_the_rest_goes_on(reports, tmp_path, monkeypatch):
    """A run that was cut off measures what is left, and then what failed; on another card it begins anew."""
    monkeypatch.setattr("gpu_tables.base.formatted", lambda *_: "1.0")
    wanted = [("bus", "a"), ("bus", "b"), ("steps", "a")]
    report = reports.Report(tmp_path, MACHINE, triton=True)
    report.add("bus", "a", reports.tried(lambda: 1 / 0))
    report.add("bus", "b", {**BUS, "rows": {**BUS["rows"], "decoupled": {"failed": "OutOfMemoryError: x"}}})
    assert report.failures() == ["bus a: ZeroDivisionError: division by zero", "bus b, decoupled: OutOfMemoryError: x"]
    page = (tmp_path / "gpu.md").read_text()
    assert "- bus a: ZeroDivisionError: division by zero" in page
    assert "| coupled | 2.00 | 1.0 | 1.1 | no |" in page
    resumed = reports.Report(tmp_path, MACHINE, triton=True, resume=True)
    assert resumed.left(wanted) == [("steps", "a"), ("bus", "a"), ("bus", "b")]
    resumed.add("bus", "b", BUS)
    assert resumed.left(wanted) == [("steps", "a"), ("bus", "a")]
    for other in ({"date": "tomorrow"}, {"gpu": "another"}):
        assert reports.Report(tmp_path, {**MACHINE, **other}, triton=True, resume=True).left(wanted) == wanted


def test_a_lost_device_ends_the_run(reports):
    def lost():
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with ...")

    with pytest.raises(reports.LostDeviceError, match=r"RuntimeError: CUDA error: an illegal memory .* encountered$"):
        reports.tried(lost)


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
