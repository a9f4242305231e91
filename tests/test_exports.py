"""The public names, their docstrings, and the modules that importing them loads."""

from __future__ import annotations

import inspect
import pkgutil
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import conservtl

HEAVY = (
    "torchvision",
    "torchaudio",
    "accelerate",
    "matplotlib",
    "sklearn",
    "timm",
    "soundfile",
    "hypothesis",
    "jinja2",
    "lightning",
    "PIL",
    "espeakng_loader",
    "scipy",
)
MODULES = [found.name for found in pkgutil.walk_packages(conservtl.__path__, "conservtl.")]
DESIGNED = {"adapt", "fit", "Training", "LayerTransfer", "L2SP", "DiscriminativeLR", "GradualUnfreezing"}


def test_all_is_sorted_and_complete():
    """Constants, classes and functions apart, as ruff sorts them; what the package defines is listed."""
    listed = conservtl.__all__
    assert listed == sorted(listed, key=lambda name: (name.upper() != name, name[0].islower(), name))
    assert len(set(listed)) == len(listed)
    own = {
        name
        for name, value in vars(conservtl).items()
        if not name.startswith("_") and str(getattr(value, "__module__", "")).startswith("conservtl")
    }
    assert own <= set(listed)
    assert set(listed) >= DESIGNED


def test_type_checkers_see_the_same_names():
    """``__init__.pyi`` is written from what is imported; a new or moved name makes it stale."""
    written = runpy.run_path(str(Path(__file__).with_name("write_stub.py")))
    assert written["STUB"].read_text() == written["stub"](), (
        "conservtl/__init__.pyi is stale: run python tests/write_stub.py"
    )


@pytest.mark.parametrize("name", conservtl.__all__)
def test_every_public_name_is_documented(name):
    value = getattr(conservtl, name)
    assert inspect.getdoc(value)
    if inspect.isclass(value):
        own = [base for base in value.__mro__ if base.__module__.startswith("conservtl.")]
        for member, found in (entry for base in own for entry in vars(base).items()):
            if not member.startswith("_") and (inspect.isfunction(found) or isinstance(found, property)):
                assert inspect.getdoc(found), f"{name}.{member}"


def imported(name):
    """Import a module; one that needs an extra is skipped by the extra's name."""
    return pytest.importorskip(name, exc_type=conservtl.MissingExtraError)


@pytest.mark.parametrize("name", [m for m in MODULES if "_worker" not in m])
def test_every_module_says_what_it_is(name):
    module = imported(name)
    assert module.__doc__
    missing = [public for public in getattr(module, "__all__", []) if not hasattr(module, public)]
    assert not missing


def test_import_is_light():
    """Importing the package imports no extra, nor does importing its tasks and its reports."""
    modules = "conservtl, conservtl.report, conservtl.tasks.speech, conservtl.tasks.vision"
    code = f"import sys, {modules}; print([m for m in {HEAVY!r} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.strip() == "[]"


def test_testing_names_the_extra_that_is_missing(python):
    code = (
        "import sys; sys.modules['hypothesis'] = None\n"
        "import conservtl\n"
        "try:\n    import conservtl.testing\n"
        "except conservtl.MissingExtraError as error:\n    print(error)"
    )
    found = python("-c", code)
    assert "hypothesis is needed here" in found.stdout
    assert "conservtl[dev]" in found.stdout


def test_errors_are_subclasses_of_the_builtin_ones():
    """`except ValueError` and `except ImportError` catch them; InputError has exit code 2."""
    for name in conservtl.__all__:
        value = getattr(conservtl, name)
        if inspect.isclass(value) and issubclass(value, Exception):
            assert issubclass(value, conservtl.ConservtlError)
    assert issubclass(conservtl.InputError, ValueError)
    assert issubclass(conservtl.MissingExtraError, ImportError)
    for name in ("SpecError", "SelectorError", "PlanError", "SourceError", "DataError"):
        assert issubclass(getattr(conservtl, name), conservtl.InputError)
