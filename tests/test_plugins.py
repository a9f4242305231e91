"""Extensions: modules found by name or path, entry points of installed packages."""

import sys
from importlib.metadata import EntryPoint

import pytest

from conservtl import SpecError, plugins


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(plugins, "_IMPORTED", {})
    plugins.load_entry_points.cache_clear()
    yield
    plugins.load_entry_points.cache_clear()


def test_a_module_is_found_by_path_and_by_name_in_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "plugin_by_path.py").write_text("VALUE = 1")
    (tmp_path / "plugin_by_name.py").write_text("VALUE = 2")
    monkeypatch.chdir(tmp_path)
    plugins.import_modules([str(tmp_path / "plugin_by_path.py"), "plugin_by_name"])
    assert (sys.modules["plugin_by_path"].VALUE, sys.modules["plugin_by_name"].VALUE) == (1, 2)
    assert plugins.imported_modules() == (str(tmp_path / "plugin_by_path.py"), "plugin_by_name")


@pytest.mark.parametrize("content", [None, "raise RuntimeError('broken')", "import a_package_that_is_not_there"])
def test_a_module_that_cannot_be_imported_is_named(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    if content is not None:
        (tmp_path / "plugin_that_fails.py").write_text(content)
    with pytest.raises(SpecError, match=r"--import 'plugin_that_fails': .*(No module|broken)"):
        plugins.import_modules(["plugin_that_fails"])
    assert sys.path == before
    assert plugins.imported_modules() == ()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_metods.py", r"there is no file 'my_metods\.py'\. Did you mean 'my_methods\.py'\?"),
        ("./my_metods.py", r"there is no file 'my_metods\.py'\. Did you mean 'my_methods\.py'\?"),
        ("pack/toy_taks", r"there is no file 'pack/toy_taks'\. Did you mean 'pack/toy_task'\?"),
        ("pack/zz.py", r"there is no file 'pack/zz\.py'\. There are pack/toy_task\."),
        ("nowhere/at_all.py", r"there is no file 'nowhere/at_all\.py'\.$"),
    ],
)
def test_a_file_that_is_not_there_is_named(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_methods.py").write_text("")
    (tmp_path / "my_notes.txt").write_text("")
    (tmp_path / "pack" / "toy_task").mkdir(parents=True)
    (tmp_path / "pack" / "toy_task" / "__init__.py").write_text("")
    with pytest.raises(SpecError, match=rf"--import '{name}': {message}"):
        plugins.import_modules([name])
    assert plugins.imported_modules() == ()


def test_entry_points_are_loaded_once_and_a_broken_one_is_named(tmp_path, monkeypatch):
    (tmp_path / "plugin_of_a_package.py").write_text("LOADED = []\nLOADED.append(1)")
    monkeypatch.syspath_prepend(str(tmp_path))
    points = {
        "whole": [EntryPoint("mine", "plugin_of_a_package", "whole")],
        "broken": [EntryPoint("theirs", "a_package_that_is_not_there:Task", "broken")],
    }
    monkeypatch.setattr(plugins, "entry_points", lambda group: points.pop(group, []))
    plugins.load_entry_points("whole")
    plugins.load_entry_points("whole")
    assert sys.modules["plugin_of_a_package"].LOADED == [1]
    with pytest.raises(SpecError, match="entry point 'theirs' of group 'broken'"):
        plugins.load_entry_points("broken")
