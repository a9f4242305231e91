"""Every example in a docstring runs as it stands."""

import doctest
from pathlib import Path

import pytest

from conservtl import MissingExtraError

PACKAGE = Path(__file__).parents[1] / "conservtl"
MODULES = [
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    for path in sorted(PACKAGE.rglob("*.py"))
    if ">>>" in path.read_text(encoding="utf-8") and "testing" not in path.parts  # those have a test of their own
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    found = doctest.testmod(pytest.importorskip(name, exc_type=MissingExtraError))
    assert found.attempted
    assert not found.failed
