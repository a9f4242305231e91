"""Types of the public API: signatures before first use, and what a type checker makes of an installed wheel."""

import importlib.util
import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RIGHT = """
import conservtl as ctl
import torch

model = torch.nn.Linear(2, 2)
strategies = [ctl.L2SP(alpha=0.1, mode="decoupled"), ctl.DiscriminativeLR(decay=0.8)]
adaptation = ctl.adapt(model, ctl.itself(missing=[]), strategies)
settings = ctl.Training(epochs=3, keep="target")
drift: dict[str, float] = adaptation.drift()
"""
WRONG = {
    "ctl.L2SP(alfa=0.1)": 'Unexpected keyword argument "alfa" for "L2SP"',
    "ctl.L2SP(alpha='much')": 'Argument "alpha" to "L2SP" has incompatible type "str"',
    "ctl.L2SP(mode='triple')": 'Argument "mode" to "L2SP" has incompatible type',
    "ctl.Training(epoch=3)": 'Unexpected keyword argument "epoch" for "Training"',
    "ctl.adopt": 'Module has no attribute "adopt"',
}
SIGNATURES = """
import inspect, pydoc
import conservtl as ctl
for name in ctl.__all__:
    fields = getattr(getattr(ctl, name), "model_fields", None)
    if fields is not None:
        shown = inspect.signature(getattr(ctl, name)).parameters
        missing = [field for field in fields if field not in shown]
        print(name, len(shown), missing)
print(pydoc.plain(pydoc.render_doc(ctl.Training)))
"""


def test_signatures_and_help_show_fields_before_first_use(python):
    """In a process of its own: classes are built at first use, and those of other tests are built already."""
    done = python("-c", SIGNATURES)
    classes, _, page = done.stdout.partition("Python Library Documentation")
    lines = classes.splitlines()
    assert len(lines) > 20
    assert [line for line in lines if not line.endswith("[]")] == []
    assert "L2SP 10 []" in lines
    assert "Training(*, epochs: " in page
    assert "= 10, batch_size: " in page
    assert "lr: " in page


def test_a_class_without_all_its_types_has_the_signature_of_its_constructor():
    """And not that of its base, which is complete."""
    import inspect

    from conservtl.spec_model import FrozenModel

    class Base(FrozenModel):
        a: int = 1

    class Incomplete(Base):
        b: "Nowhere" = None  # noqa: F821

    assert list(inspect.signature(Base).parameters) == ["a"]
    assert list(inspect.signature(Incomplete).parameters) == ["data"]
    assert list(inspect.signature(type("Child", (Base,), {"__module__": __name__})).parameters) == ["a"]


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Python in an environment of its own with the wheel, beside the packages of this one."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True, timeout=60)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    command = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = Path(subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip())
    zipfile.ZipFile(wheel).extractall(site)
    (site / "others.pth").write_text(sysconfig.get_path("purelib"))
    return python


def check(python, code, folder):
    """Run mypy on a user's file; torch's own types are left out, which take it half a minute to read."""
    (folder / "mypy.ini").write_text("[mypy]\nstrict = true\n[mypy-torch.*]\nfollow_imports = skip\n")
    (folder / "users.py").write_text(code)
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MYPYPATH")}
    command = [sys.executable, "-m", "mypy", "--python-executable", python, "--cache-dir", ".cache", "users.py"]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def test_a_type_checker_reads_the_installed_wheel(installed, tmp_path):
    if importlib.util.find_spec("mypy") is None:
        pytest.skip("mypy is not installed")
    wrong = "import conservtl as ctl\n" + "\n".join(WRONG) + "\n"
    done = check(installed, wrong, tmp_path)
    lines = done.stdout.splitlines()
    for number, (line, message) in enumerate(WRONG.items(), 2):
        assert any(found.startswith(f"users.py:{number}: error: {message}") for found in lines), (line, done.stdout)
    done = check(installed, RIGHT, tmp_path)
    assert done.returncode == 0, done.stdout


def test_a_source_distribution_holds_the_markers_and_the_tests(tmp_path):
    if importlib.util.find_spec("hatchling") is None:
        pytest.skip("hatchling is not installed, so nothing can be built")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True, timeout=300)
    (found,) = tmp_path.glob("conservtl-*.tar.gz")
    with tarfile.open(found) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"conservtl/py.typed", "conservtl/__init__.pyi", "tests/test_types.py", "pyproject.toml"} <= names
    read = {"ARCHITECTURE.md", "CHANGELOG.md", "CITATION.cff", "constraints.txt", "docs/trainers.md", ".ci/run"}
    assert read | {".github/workflows/ci.yml", "benchmarks/results/methods.md", "examples/speech/spec.yaml"} <= names
