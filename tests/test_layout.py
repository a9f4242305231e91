"""Laws of the package's files: no hidden module, no private name from elsewhere."""

import ast
import importlib
import pkgutil
from pathlib import Path
from types import ModuleType

import pytest

import conservtl

ROOT = Path(conservtl.__file__).parent
PACKAGES = ["conservtl", *(m.name for m in pkgutil.walk_packages(conservtl.__path__, "conservtl.") if m.ispkg)]
FILES = sorted(ROOT.rglob("*.py"))


@pytest.mark.parametrize("name", PACKAGES)
def test_no_module_is_hidden_by_a_name_of_its_package(name):
    """`import package.module` and `package.module` are the same thing."""
    package = importlib.import_module(name)
    modules = [module.name for module in pkgutil.iter_modules(package.__path__) if module.name != "__main__"]
    exported = {own: getattr(package, own) for own in (*vars(package), *getattr(package, "__all__", ()))}
    hidden = [own for own in modules if own in exported and not isinstance(exported[own], ModuleType)]
    assert not hidden, f"{name} exports another thing under the name of its module {hidden}"


def private_uses(path, root):
    """Private modules of other folders and private names of other modules that a file uses, by line."""
    package = path.relative_to(root.parent).with_suffix("").parts
    folder = ".".join(package[:-1])
    tree = ast.parse(path.read_text(encoding="utf-8"))
    modules = {}  # local name -> module of this package
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == root.name:
            for alias in node.names:
                if (root.parent / node.module.replace(".", "/") / f"{alias.name}.py").is_file():
                    modules[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                    imported = f"{node.module}.{alias.name}"
                else:
                    imported = node.module
                    if alias.name.startswith("_") and not alias.name.startswith("__"):
                        found.append((node.lineno, f"{node.module}.{alias.name}"))
                found += [(node.lineno, imported)] * _foreign(imported, folder)
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.partition(".")[0] == root.name]
            found += [(node.lineno, name) for name in names if _foreign(name, folder)]
    reads = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name))
    for node in reads:
        if node.value.id in modules and node.attr.startswith("_") and not node.attr.startswith("__"):
            found.append((node.lineno, f"{modules[node.value.id]}.{node.attr}"))
    return found


def _foreign(module, folder):
    """Whether a module is private to another folder than one of those that a file is in."""
    parts = module.split(".")
    homes = [".".join(parts[:place]) for place, part in enumerate(parts) if part.startswith("_") and part != "__init__"]
    return any(folder != home and not folder.startswith(f"{home}.") for home in homes)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_has_an_underscore_is_private(path):
    """A module to its folder, a name to its module."""
    assert not private_uses(path, ROOT)


@pytest.mark.parametrize(
    ("line", "count"),
    [
        ("from pack.inner._own import thing", 0),
        ("from pack.inner import _own", 0),
        ("from pack.other._theirs import thing", 1),
        ("from pack.other import _theirs", 1),
        ("import pack.other._theirs", 1),
        ("from pack.other.plain import _thing", 1),
        ("from pack.other import plain\nplain._thing()", 1),
        ("from pack.other import plain\nplain.thing()", 0),
        ("from torch import _foreach_add", 0),
        ("from pack.other.plain import __version__", 0),
    ],
)
def test_that_law_sees_what_breaks_it(tmp_path, line, count):
    for name in ("inner/_own", "inner/file", "other/_theirs", "other/plain"):
        (tmp_path / "pack" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "pack" / f"{name}.py").write_text("")
    (tmp_path / "pack" / "inner" / "file.py").write_text(line)
    assert len(private_uses(tmp_path / "pack" / "inner" / "file.py", tmp_path / "pack")) == count


def test_values_do_not_change():
    """Dataclasses are frozen, but for those that gather what is found on the way."""
    changing = set()
    for text in (path.read_text(encoding="utf-8") for path in FILES):
        for node in ast.walk(ast.parse(text)) if "@dataclass" in text else ():
            marks = [ast.unparse(one) for one in getattr(node, "decorator_list", ())]
            if any(one.startswith("dataclass") and "frozen=True" not in one for one in marks):
                changing.add(node.name)
    assert changing == {"Node", "Passes", "Record", "Selection", "State"}
