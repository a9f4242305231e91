"""A strategy in a package of its own: installed into a throw-away folder, a spec names its kind without --import."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import conservtl as ctl

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "examples" / "extend" / "package"
MODULE = PACKAGE / "src" / "slow_norms" / "__init__.py"
SPEC = ROOT / "examples" / "extend" / "spec.yaml"
STRATEGY = "strategies=[{kind: slow_norms, factor: 0.25}]"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder into which pip installs a copy of the package."""
    for needed in ("hatchling", "pip"):
        try:
            importlib.metadata.version(needed)
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"{needed} is not installed, so the package cannot be")
    folder = tmp_path_factory.mktemp("package")
    shutil.copytree(PACKAGE, folder / "source", ignore=shutil.ignore_patterns("__pycache__"))
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "-q"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", folder / "site", folder / "source"]
    subprocess.run(command, capture_output=True, timeout=300, check=True)
    return folder / "site"


@pytest.fixture
def beside_it(python, installed):
    """Call a function without arguments, given by its place, where the package is installed."""

    def run(module, name, *words):
        code = f"import sys; sys.path.append(sys.argv.pop(1)); from {module} import {name}; sys.exit({name}())"
        return python("-c", code, installed, *words)

    return run


def test_it_is_one_module_of_30_lines():
    assert len(MODULE.read_text().splitlines()) <= 30
    assert list(MODULE.parent.glob("*.py")) == [MODULE]


def test_a_spec_names_its_kind_once_it_is_installed(beside_it, tmp_path):
    """Without the package the kind is unknown; with it a run trains norms at a quarter of the rate."""
    pytest.importorskip("sklearn")
    with pytest.raises(ctl.SpecError, match="slow_norms"):
        ctl.adapt(torch.nn.Linear(1, 1), ctl.itself(missing=[]), [{"kind": "slow_norms"}])
    settings = [STRATEGY, "source.training.epochs=1", "training.epochs=1", "training.evaluate_every=1"]
    settings += [f"source.cache={tmp_path / 'cache'}"]
    words = [word for text in settings for word in ("--set", text)]
    done = beside_it("conservtl.cli", "main", "run", SPEC, *words, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "out" / "report.json").read_text())["plan"]["rows"]
    assert {row["kind"] == "norm": row["scale"] for row in rows} == {True: 0.25, False: 1.0}


def test_its_own_test_holds_it_to_the_contract(beside_it, installed):
    tests = installed.with_name("source") / "tests"
    done = beside_it("pytest", "main", "-p", "no:cacheprovider", "-c", os.devnull, tests)
    assert done.returncode == 0, done.stdout
    assert "3 passed" in done.stdout
