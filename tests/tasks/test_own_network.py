"""A network of the user's own in a spec: ``model: {import: "package.module:build"}``, run only after ``--import``."""

import sys

import pytest
import torch
from torch import nn

import conservtl as ctl
from conservtl import plugins
from conservtl.experiments.run.runner import run
from conservtl.experiments.spec.spec import dump_spec, load_spec, parse_spec, schema
from conservtl.tasks.registry import task_named

CODE = """
from torch import nn

def build(outputs, width=4):
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, width), nn.ReLU(), nn.Linear(width, outputs))

def number(outputs):
    return outputs

raised = 3
"""
DIGITS = {
    "task": "vision",
    "data": {"kind": "digits", "shots": 2, "images": {"size": 8}},
    "source": {"training": {"epochs": 1}},
    "training": {"epochs": 1},
}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package beside the current folder; what a test imports of it is forgotten afterwards."""
    folder = tmp_path / "own_networks"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "small.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plugins, "_IMPORTED", {})
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] in ("own_networks", "small")]:
        del sys.modules[name]


def spec_of(tmp_path, **model):
    source = {**DIGITS["source"], "cache": str(tmp_path / "cache")}
    return parse_spec({**DIGITS, "source": source, "model": model})


def built(spec, outputs=3):
    return spec.problem.build(spec.model, None, outputs)


@pytest.mark.parametrize("given", ["own_networks", "own_networks.small", "path of the package", "path of the file"])
def test_it_is_built_after_an_import(package, tmp_path, given):
    paths = {"path of the package": str(package), "path of the file": str(package / "small.py")}
    plugins.import_modules([paths.get(given, given)])
    module = "small" if given == "path of the file" else "own_networks.small"
    network = built(spec_of(tmp_path, **{"import": f"{module}:build", "args": {"width": 6}}), 5)
    assert [tuple(p.shape) for p in network.parameters()] == [(6, 192), (6,), (5, 6), (5,)]


@pytest.mark.parametrize("named", ["own_networks.small:build", "os:system", "subprocess:run", "torch.hub:load"])
@pytest.mark.parametrize("task", ["vision", "speech"])
def test_nothing_is_imported_without_it(package, tmp_path, named, task):
    """Nor run: a module that Python has loaded already counts for nothing."""
    problem = task_named(task)
    model = problem.model_section.model_validate({"import": named})
    package_name = named.partition(":")[0].partition(".")[0]
    with pytest.raises(ctl.SpecError, match=rf"names code, which no spec runs by itself.*--import {package_name} on"):
        problem.build(model, None, 3)
    assert "own_networks.small" not in sys.modules


def test_a_package_of_a_similar_name_does_not_count(package, tmp_path):
    plugins.import_modules(["own_networks"])
    with pytest.raises(ctl.SpecError, match="no spec runs by itself"):
        built(spec_of(tmp_path, **{"import": "own_networks_evil:build"}))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"import": "own_networks.smal:build"}, r"own_networks\.smal cannot be imported"),
        ({"import": "own_networks.small:biuld"}, r"has no function 'biuld'\. Did you mean 'build'"),
        ({"import": "own_networks.small:raised"}, "has no function 'raised'"),
        ({"import": "own_networks.small:build", "args": {"widht": 3}}, r"model\.args by keyword \(widht\).*'widht'"),
        ({"import": "own_networks.small:number"}, r"must return a torch\.nn\.Module; it returns 3\."),
    ],
)
def test_a_wrong_function_is_named(package, tmp_path, model, message):
    plugins.import_modules(["own_networks"])
    with pytest.raises(ctl.SpecError, match=message):
        built(spec_of(tmp_path, **model))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            {"import": "own_networks.small"},
            r"model\.import: must have the form package\.module:build; received 'own_networks\.small'",
        ),
        ({"import": "own_networks.small:build", "name": "resnet18"}, r"model\.name: .*a model has one network"),
        ({"own": "own_networks.small:build"}, r"model\.own: there is no such field"),
    ],
)
def test_a_wrong_field_is_named(tmp_path, model, message):
    with pytest.raises(ctl.SpecError, match=message):
        spec_of(tmp_path, **model)


def test_it_is_written_and_read_back(tmp_path):
    spec = spec_of(tmp_path, **{"import": "own_networks.small:build", "args": {"width": 6}})
    assert "  import: own_networks.small:build\n  args:\n    width: 6\n" in dump_spec(spec)
    (tmp_path / "spec.yaml").write_text(dump_spec(spec))
    assert load_spec(tmp_path / "spec.yaml") == spec
    assert list(parse_spec(DIGITS).model.model_dump()) == ["name", "args", "head"]
    assert '"import"' in schema()


def test_a_run(package, tmp_path):
    pytest.importorskip("sklearn")
    plugins.import_modules(["own_networks"])
    torch.manual_seed(0)
    report = run(spec_of(tmp_path, **{"import": "own_networks.small:build"}), tmp_path / "out")
    assert report["spec"]["model"] == {"import": "own_networks.small:build", "args": {}, "head": None}
    assert isinstance(ctl.load_adapted(tmp_path / "out").model, nn.Sequential)
    first = len(list((tmp_path / "cache").glob("*.safetensors")))
    (package / "small.py").write_text(CODE.replace("ReLU", "Tanh"))
    del sys.modules["own_networks.small"]
    run(spec_of(tmp_path, **{"import": "own_networks.small:build"}), tmp_path / "changed")
    assert (first, len(list((tmp_path / "cache").glob("*.safetensors")))) == (1, 2)  # the code is in the cache's key
    plugins._IMPORTED.clear()
    with pytest.raises(ctl.SpecError, match="no spec runs by itself"):
        ctl.load_adapted(tmp_path / "out")
