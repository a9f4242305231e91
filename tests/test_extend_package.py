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
    python("-m", "pip", "install", *options, "--target", folder / "site", folder / "source", check=True)
    return folder / "site"


def python(*words, site=None, check=False):
    """Run Python with this source tree, and with an installed package."""
    others = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and Path(path) != ROOT]
    paths = os.pathsep.join([str(ROOT), *([str(site)] if site else []), *others])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=check)


def test_it_is_one_module_of_30_lines():
    assert len(MODULE.read_text().splitlines()) <= 30
    assert list(MODULE.parent.glob("*.py")) == [MODULE]


def test_a_spec_names_its_kind_once_it_is_installed(installed, tmp_path):
    """Without the package the kind is unknown; with it a run trains norms at a quarter of the rate."""
    pytest.importorskip("sklearn")
    with pytest.raises(ctl.SpecError, match="slow_norms"):
        ctl.adapt(torch.nn.Linear(1, 1), ctl.itself(missing=[]), [{"kind": "slow_norms"}])
    settings = [STRATEGY, "source.training.epochs=1", "training.epochs=1", "training.evaluate_every=1"]
    settings += [f"source.cache={tmp_path / 'cache'}"]
    words = [word for text in settings for word in ("--set", text)]
    done = python("-m", "conservtl.cli", "run", SPEC, *words, "--out", tmp_path / "out", site=installed)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "out" / "report.json").read_text())["plan"]["rows"]
    assert {row["kind"] == "norm": row["scale"] for row in rows} == {True: 0.25, False: 1.0}


def test_its_own_test_holds_it_to_the_contract(installed):
    tests = installed.with_name("source") / "tests"
    done = python("-m", "pytest", "-p", "no:cacheprovider", "-c", os.devnull, tests, site=installed)
    assert done.returncode == 0, done.stdout
    assert "3 passed" in done.stdout
