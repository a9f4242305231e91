"""A study's result, page and closing lines tell which files all its runs left out."""

from __future__ import annotations

import json
import shutil
import sys

import pytest

from conservtl.cli import main
from conservtl.experiments.studies.run_results import over_all
from conservtl.report import write_range_test

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")


@pytest.fixture
def fields(speech_fields, tmp_path):
    """A spec whose folder holds two files that are no recordings."""
    root = tmp_path / "recordings"
    shutil.copytree(speech_fields["data"]["root"], root)
    for file in sorted(root.rglob("*_anna_*.wav"))[:1] + sorted(root.rglob("*_cleo_*.wav"))[:1]:
        file.with_stem(file.stem + "9").write_text("<b>no sound</b>")
    data = {**speech_fields["data"], "root": str(root), "on_bad": "skip", "validation": 0.5}
    training = {**speech_fields["training"], "epochs": 1}
    return {**speech_fields, "data": data, "training": training}


SECTIONS = {
    "compare": {"targets": ["cleo"], "seeds": 1, "baselines": ["source as it is"]},
    "sweep": {"targets": ["cleo"], "seeds": 1, "layers": [0], "sides": ["input"], "controls": False, "strengths": [1]},
    "tune": {"trials": 1, "objective": "target"},
}


@pytest.mark.parametrize("study", SECTIONS)
def test_a_study_counts_and_lists_them(fields, tmp_path, capsys, monkeypatch, study):
    if study == "tune":
        pytest.importorskip("optuna")
        fields["training"]["lr"] = {"choices": [1e-3]}
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps({**fields, study: SECTIONS[study]}))
    monkeypatch.setattr(sys, "argv", ["conservtl", study, str(spec), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 0
    result = json.loads((tmp_path / "out" / f"{study}.json").read_text())
    assert result["skipped"]["count"] == 2
    assert [entry["file"].split("_")[1] for entry in result["skipped"]["files"]] == ["anna", "cleo"]
    assert all("cannot be read as audio" in entry["reason"] for entry in result["skipped"]["files"])
    assert not any("skipped" in run for run in result.get("runs", []))
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Files that were skipped: 2" in page
    assert all(entry["file"] in page for entry in result["skipped"]["files"])
    assert "2 files are skipped: " in capsys.readouterr().out


def test_files_are_counted_once_over_all_runs():
    """Runs on other data skip other files; a list that is cut keeps its count."""
    a, b = ({"file": name, "reason": "is empty"} for name in "ab")
    runs = [{"skipped": {"count": 1, "files": [b]}}, {"skipped": {"count": 1, "files": [a]}}, {"variant": "of before"}]
    assert over_all(runs)["skipped"] == {"count": 2, "files": [a, b]}
    assert over_all([{"skipped": {"count": 300, "files": [a]}}])["skipped"] == {"count": 300, "files": [a]}
    assert over_all([])["skipped"] == {"count": 0, "files": []}


def test_a_study_without_bad_files_says_nothing(tmp_path):
    result = {"kind": "range_test", "rates": [1e-5, 1e-4, 1e-3], "losses": [2.0, 1.0, 3.0], "smoothed": [2.0, 1.0, 3.0]}
    result |= {"suggestion": 1e-5, "steepest": 1e-5, "diverged": None, "spec": {}, "skipped": {"count": 0, "files": []}}
    write_range_test(result, tmp_path / "page.html")
    assert "skipped" not in (tmp_path / "page.html").read_text()
