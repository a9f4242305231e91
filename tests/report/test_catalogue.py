"""The list of methods is what code and benchmarks say."""

import importlib.util
import json
from pathlib import Path

import pytest

import conservtl as ctl
from conservtl.methods import builtin_strategies
from conservtl.report.text.catalogue import catalogue, full_text, short_text

ROOT = Path(__file__).parents[2]


def test_every_strategy_says_everything():
    found = [entry for entry in catalogue() if entry.name in builtin_strategies()]
    assert {entry.name for entry in found} == set(builtin_strategies())
    for entry in found:
        assert "not said" not in (entry.effect, entry.paper, entry.cost, entry.hurts), entry.name
        assert all(text for _, _, text in entry.fields), entry.name


def test_one_in_full():
    (entry,) = catalogue("l2_sp")
    text = full_text(entry)
    for part in ("Li, Grandvalet and Davoine 2018", "alpha = None", "beta = 0.01", "L2SP, decoupled: 0.1 ± 0.5"):
        assert part in text
    assert catalogue("l2sp") == catalogue("L2SP") == [entry]


def test_globs_and_what_is_not_measured():
    found = [entry.kind for entry in catalogue("*_sp") if entry.name in builtin_strategies()]
    assert found == ["fisher_sp", "group_lasso_sp", "l1_sp", "l2_sp"]
    assert "gain   not measured" in short_text(catalogue("layer_transfer*"))
    with pytest.raises(ctl.SpecError, match="Did you mean 'l2_sp'"):
        catalogue("l2_spp")


def test_the_shipped_table_is_the_benchmark_s():
    spec = importlib.util.spec_from_file_location("shipped", ROOT / "benchmarks/shipped.py")
    shipped = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(shipped)
    results = (ROOT / "benchmarks/results/methods.md").read_text(encoding="utf-8")
    assert json.loads(shipped.SHIPPED.read_text(encoding="utf-8")) == shipped.gains(results), (
        "run benchmarks/shipped.py"
    )


def test_the_documentation_names_every_strategy():
    documented = (ROOT / "docs/methods.md").read_text(encoding="utf-8")
    assert [
        name for name in builtin_strategies() if f"`{name}`" not in documented and f"`{name}(" not in documented
    ] == []
