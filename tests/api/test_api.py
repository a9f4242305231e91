"""The names, options and fields that others build on are those of the files beside this one."""

import json
import runpy
from pathlib import Path

import pytest

import conservtl

WRITER = Path(__file__).parents[1] / "write_stub.py"
WRITTEN = runpy.run_path(str(WRITER))
SECTIONS = WRITTEN["sections"](WRITTEN["PUBLIC"].read_text(encoding="utf-8"))
RULE = "run python tests/write_stub.py, read what changed, and follow CONTRIBUTING.md, Deprecation"


def test_every_public_module_has_a_section():
    assert list(SECTIONS) == [*WRITTEN["MODULES"], WRITTEN["COMMANDS"]], RULE


@pytest.mark.parametrize("section", SECTIONS)
def test_public_names_and_signatures_are_those_in_the_file(section):
    if section != WRITTEN["COMMANDS"]:
        pytest.importorskip(section, exc_type=conservtl.MissingExtraError)
    assert WRITTEN["described"](section) == SECTIONS[section], RULE


def test_the_schema_of_a_spec_is_that_in_the_file(python):
    """In a process of its own, because other tests register strategies and tasks."""
    code = f"import json, runpy; print(json.dumps(runpy.run_path({str(WRITER)!r})['schema']()))"
    done = python("-c", code)
    assert json.loads(done.stdout) == json.loads(WRITTEN["SCHEMA"].read_text(encoding="utf-8")), RULE


def test_the_file_shows_parameters_defaults_methods_and_aliases():
    """Lines that a change of a signature would change, written out."""
    listed = SECTIONS["conservtl"]
    assert (
        "load_adapted(folder: str | Path, model: nn.Module | Callable[[], nn.Module] | None = None, *, "
        "decoding: Mapping[str, Any] | None = None) -> Adapted" in listed
    )
    assert "load = load_adapted  # deprecated" in listed
    assert "Anneal(*, steps: Count, start: NonNegative = 1.0, end: NonNegative = 0.0, " in "\n".join(listed)
    assert "SelectorError(SpecError)" in listed
    adaptation = listed[listed.index(next(line for line in listed if line.startswith("Adaptation("))) + 1 :]
    assert any(line.startswith("  .optimizer(self, ") for line in adaptation)
    assert "  .metric" not in "\n".join(SECTIONS["conservtl.tasks.headline"])


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("def one(a: int, *, b: str = 'x') -> int: ...", "def one(a: int, *, b: str = 'y') -> int: ..."),
        ("def one(a: int) -> int: ...", "def one(a: int | None) -> int: ..."),
        ("def one(a: int) -> int: ...", "def one(*, a: int) -> int: ..."),
        ("def one(a: int) -> int: ...", "def one(a: int) -> str: ..."),
        ("def one(*rest: int) -> int: ...", "def one(**rest: int) -> int: ..."),
        ("class one:\n    def two(self) -> int: ...", "class one:\n    def three(self) -> int: ..."),
        ("class one:\n    @property\n    def two(self) -> int: ...", "class one:\n    def two(self) -> int: ..."),
        ("class one(ValueError): ...", "class one(TypeError): ..."),
        ("class one(FrozenModel):\n    a: int = 1", "class one(FrozenModel):\n    a: int = 2"),
        ("class one(FrozenModel):\n    a: int = 1", "class one(FrozenModel):\n    a: int\n"),
        ("class one(IntEnum):\n    a = 1", "class one(IntEnum):\n    a = 2"),
        ("class one:\n    a: ClassVar[int] = 1", "class one:\n    a: ClassVar[str] = 1"),
    ],
)
def test_each_change_of_a_signature_shows(before, after):
    def lines(text):
        names = {"__name__": "made"}
        head = "from __future__ import annotations\nfrom enum import IntEnum\nfrom typing import ClassVar\n"
        exec(f"{head}from conservtl.spec_model import FrozenModel\n{text}", names)
        return list(WRITTEN["_lines"]("one", names["one"]))

    assert lines(before) == lines(before)
    assert lines(before) != lines(after)


def test_prose_is_no_part_of_the_schema_but_a_field_named_title_is():
    schema = {"title": "T", "description": "d", "properties": {"title": {"type": "string", "title": "Title"}}}
    assert WRITTEN["_bare"](schema) == {"properties": {"title": {"type": "string"}}}
