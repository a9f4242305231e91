"""Examples of extending conservtl, from the source tree and from an installed wheel."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples" / "extend"
QUICK = ["source.training.epochs=1", "training.epochs=1", "training.evaluate_every=1"]


@pytest.fixture(scope="module")
def beside(tmp_path_factory):
    """A folder with a copy of the examples."""
    folder = tmp_path_factory.mktemp("work")
    shutil.copytree(EXAMPLES, folder / "extend", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.mark.parametrize("script", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_a_method_keeps_the_contract(python, beside, script):
    done = python(f"extend/{script}", folder=beside)
    assert done.returncode == 0, done.stderr
    assert "keeps the contract" in done.stdout


@pytest.mark.parametrize(
    ("module", "kind", "shown"),
    [
        ("extend/hold_norms.py", "hold_norms", r"\), [1-9][\d,]* frozen"),
        ("extend/weight_noise.py", "weight_noise", r"noise of 0\.001 on"),
        ("extend.huber_penalty", "huber_sp", r"Huber penalty of 0\.1 beyond 0\.05 on"),
    ],
)
def test_a_spec_names_it_after_an_import(python, beside, module, kind, shown):
    pytest.importorskip("sklearn")
    words = ["-m", "conservtl.cli", "plan", "extend/spec.yaml", "--set", f"strategies=[{{kind: {kind}}}]"]
    words += [word for text in QUICK for word in ("--set", text)]
    done = python(*words, folder=beside)
    assert done.returncode == 2
    assert "--import package.module" in done.stderr
    done = python(*words, "--import", module, folder=beside)
    assert done.returncode == 0, done.stderr
    assert re.search(shown, done.stdout)


def words_of_a_run(tmp_path):
    pytest.importorskip("sklearn")
    settings = [word for text in (*QUICK, f"source.cache={tmp_path / 'cache'}") for word in ("--set", text)]
    words = ["-m", "conservtl.cli", "run", "extend/spec.yaml", *settings, "--import", "extend/huber_penalty.py"]
    return [*words, "--out", str(tmp_path / "out")]


def has_run(done, tmp_path):
    assert done.returncode == 0, done.stderr
    assert "target accuracy" in done.stdout
    assert "Huber penalty of 0.1 beyond 0.05" in (tmp_path / "out" / "report.html").read_text()


def test_a_run_with_a_penalty_of_ones_own(python, beside, tmp_path):
    has_run(python(*words_of_a_run(tmp_path), folder=beside), tmp_path)


def test_such_a_run_from_the_wheel_alone(wheel, beside, tmp_path):
    """Code, templates of pages and the command; all other files of the wheel are compared below."""
    zipfile.ZipFile(wheel).extractall(site := tmp_path / "site")
    code = "import conservtl.cli; print(conservtl.__file__, flush=True); conservtl.cli.main()"
    command = [sys.executable, "-c", code, *words_of_a_run(tmp_path)[2:]]
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=beside, env=environment, capture_output=True, text=True, check=False)
    has_run(done, tmp_path)
    assert Path(done.stdout.splitlines()[0]).is_relative_to(site)


def test_a_wheel_holds_all_that_is_not_code(wheel):
    """Templates of pages, the stub and the marker that let type checkers in, the command."""
    names = set(zipfile.ZipFile(wheel).namelist())
    package = ROOT / "conservtl"
    expected = {
        path.relative_to(ROOT).as_posix()
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {"conservtl/py.typed", "conservtl/__init__.pyi", "conservtl/report/pages/page.html.j2"} <= expected
    assert expected <= names
    assert not {name for name in names if not name.startswith("conservtl")}
