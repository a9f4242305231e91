"""Strategies by name: registered by their class, found by import, named by specs."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import pytest
import torch
from pydantic import TypeAdapter, ValidationError, create_model

import conservtl as ctl
from conservtl import plugins
from conservtl.experiments.spec.spec import parse_spec, schema
from conservtl.methods import AnyStrategy, as_strategies, as_strategy, builtin_strategies
from conservtl.methods.base import Aliases
from conservtl.spec_model import FrozenModel

ROOT = Path(__file__).parents[2]


class Idle(ctl.Strategy):
    """A base for strategies of these tests."""

    def apply(self, plan):
        return plan


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    """Classes that a test defines are forgotten after it."""
    monkeypatch.setattr(ctl.Strategy, "named", dict(ctl.Strategy.named))
    return ctl.Strategy.named


class TestRegistration:
    def test_a_class_is_known_by_its_kind_from_its_definition_on(self, speech_fields):
        fields = {"kind": "own_idle", "strength": 2}
        with pytest.raises(ctl.SpecError, match="'own_idle' is none of"):
            as_strategy(fields)

        class OwnIdle(Idle):
            kind: Literal["own_idle"] = "own_idle"
            strength: float = 1.0

        assert as_strategy(fields) == OwnIdle(strength=2)
        assert parse_spec({**speech_fields, "strategies": [fields]}).strategies == (OwnIdle(strength=2),)
        with pytest.raises(ctl.SpecError, match=r"strategies\.0\.strengthy: .* Did you mean 'strength'\?"):
            parse_spec({**speech_fields, "strategies": [{"kind": "own_idle", "strengthy": 2}]})

    def test_a_base_without_a_constant_kind_is_not_known(self, registry):
        assert Idle not in registry.values()

    def test_two_classes_of_one_kind_are_refused(self, registry):
        with pytest.raises(ctl.SpecError, match=r"kind 'l2_sp' of .*Other is that of conservtl\.methods\.l2_sp\.L2SP"):

            class Other(Idle):
                kind: Literal["l2_sp"] = "l2_sp"

        assert registry["l2_sp"] is ctl.L2SP

    def test_a_subclass_needs_a_kind_of_its_own(self):
        with pytest.raises(ctl.SpecError, match="kind 'l2_sp' of"):

            class Stronger(ctl.L2SP):
                pass

    def test_two_classes_of_one_alias_are_refused(self, registry):
        with pytest.raises(ctl.SpecError, match=r"kind 'ewc' of .*Claims is that of .*FisherSP already"):

            class Claims(Idle):
                kind: Literal["claims"] = "claims"
                aliases: ClassVar[Aliases] = {"ewc": {}}

        assert "claims" not in registry  # nothing of it is entered

    def test_a_cell_of_a_notebook_can_be_run_again(self, registry):
        def cell(value):
            class Cell(Idle):
                kind: Literal["cell"] = "cell"
                strength: float = value

            return Cell

        first, second = cell(1.0), cell(2.0)
        assert first is not second
        assert as_strategy({"kind": "cell"}) == second()

    def test_a_subclass_does_not_inherit_aliases(self):
        class Elastic(ctl.FisherSP):
            kind: Literal["elastic"] = "elastic"

        assert type(as_strategy({"kind": "ewc"})) is ctl.FisherSP


class TestAliases:
    @pytest.mark.parametrize(
        ("fields", "strategy"),
        [
            ({"kind": "l2sp", "alpha": 2}, ctl.L2SP(alpha=2)),
            ({"kind": "bss"}, ctl.SpectralShrinkage()),
            ({"kind": "delta"}, ctl.FeatureConservation(attention=True)),
            ({"kind": "ldifs"}, ctl.FeatureConservation(metric="ldifs")),
            ({"kind": "ewc"}, ctl.FisherSP(data="source")),
            ({"kind": "ewc", "data": "target"}, ctl.FisherSP(data="target")),
            ({"kind": "kld"}, ctl.OutputConservation(rho=0.1)),
            ({"kind": "lwf"}, ctl.OutputConservation(weight=0.05)),
            ({"kind": "spd"}, ctl.SelectiveDecay()),
            ({"kind": "wise_ft"}, ctl.WeightInterpolation()),
        ],
    )
    def test_a_short_name_presets_fields(self, fields, strategy, speech_fields):
        assert as_strategy(fields) == strategy
        assert parse_spec({**speech_fields, "strategies": [fields]}).strategies == (strategy,)


class TestAnyStrategy:
    ADAPTER = TypeAdapter(tuple[AnyStrategy, ...])

    def test_it_takes_instances_and_fields_and_gives_them_back(self):
        chosen = (ctl.L2SP(alpha=0.5), ctl.LayerTransfer(layers=2))
        assert self.ADAPTER.validate_python([chosen[0], chosen[1].model_dump()]) == chosen
        assert self.ADAPTER.validate_json(self.ADAPTER.dump_json(chosen)) == chosen

    @pytest.mark.parametrize(
        ("value", "place", "message"),
        [
            ({"kind": "l2_sp", "alpha": -1}, (0, "l2_sp", "alpha"), "greater than or equal to 0"),
            ({"alpha": 1}, (0,), r"kind is missing\. Name the strategy"),
            ({"kind": "l3_sp"}, (0,), "Did you mean 'l"),
            (["l2_sp"], (0,), "valid dictionary"),
            (None, (0,), "valid dictionary"),
        ],
    )
    def test_an_error_has_its_place(self, value, place, message):
        with pytest.raises(ValidationError, match=message) as found:
            self.ADAPTER.validate_python([value])
        assert found.value.errors()[0]["loc"] == place

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"kind": "l3_sp"}, r"strategies\.1: 'l3_sp' is none of auto_rgn, .*`--import package\.module`"),
            ({"alpha": 1}, r"strategies\.1: kind is missing\. Name the strategy, such as {kind: l2_sp}\."),
            ({"kind": "l2_sp", "alpha": -1}, r"strategies\.1\.alpha: .*greater than or equal to 0; received -1"),
            ({"kind": "l2_sp", "alfa": 1}, r"strategies\.1\.alfa: there is no such field\. Did you mean 'alpha'\?"),
            ("l2_sp", r"strategies\.1: must hold fields of its own"),
        ],
    )
    def test_a_spec_says_where_it_is_wrong(self, speech_fields, fields, message):
        with pytest.raises(ctl.SpecError, match=message):
            parse_spec({**speech_fields, "strategies": [{"kind": "l2_sp"}, fields]})

    @pytest.mark.parametrize(
        ("given", "fix"),
        [
            ({"kind": "l2sp"}, r"Write \[{'kind': 'l2sp'}\]\."),
            ("l2sp", r"Write \[{'kind': 'l2sp'}\]\."),
            (ctl.L2SP(), r"Write \[L2SP\(.*\)\]\."),
            ({"recipe": "vision"}, r"Write ctl\.recipe\('vision'\)\."),
            (["l2sp"], r"received 'l2sp'\. Write {'kind': 'l2sp'}\."),
            ([ctl.L2SP], r"received .*\. Write L2SP\(\)\."),
            (["l3"], "received 'l3'\\.$"),
            (None, r"must be a list; received None"),
        ],
    )
    def test_what_is_no_list_of_strategies_says_how_it_is_written(self, given, fix):
        with pytest.raises(ctl.SpecError, match=f"^strategies.*{fix}"):
            as_strategies(given)

    def test_the_schema_tells_kinds_apart_and_describes_fields(self):
        found = self.ADAPTER.json_schema()
        items = found["items"]
        assert items["discriminator"]["propertyName"] == "kind"
        assert set(items["discriminator"]["mapping"]) == {
            cls.model_fields["kind"].default for cls in ctl.Strategy.named.values()
        }
        assert "Strength" in found["$defs"]["L2SP"]["properties"]["alpha"]["description"]


class TestEntryPoints:
    @pytest.fixture
    def installed(self, tmp_path, monkeypatch):
        """A distribution that registers a strategy; how often its module was imported."""
        (tmp_path / "installed_methods.py").write_text(
            "from typing import Literal\nimport conservtl as ctl\n"
            "class Installed(ctl.Strategy):\n"
            '    kind: Literal["installed"] = "installed"\n'
            "    def apply(self, plan):\n        return plan\n"
        )
        monkeypatch.syspath_prepend(str(tmp_path))
        points = [EntryPoint("mine", "installed_methods", "conservtl.methods")]
        monkeypatch.setattr(plugins, "entry_points", lambda group: points if group == "conservtl.methods" else [])
        plugins.load_entry_points.cache_clear()
        yield points
        plugins.load_entry_points.cache_clear()
        sys.modules.pop("installed_methods", None)

    @pytest.mark.usefixtures("installed")
    def test_they_are_loaded_when_fields_are_read_and_not_before(self):
        assert as_strategy(ctl.L2SP()) == ctl.L2SP()
        assert "installed_methods" not in sys.modules
        assert as_strategy({"kind": "installed"}).label == "Installed"

    def test_a_broken_one_names_itself(self, installed, speech_fields):
        installed[:] = [EntryPoint("theirs", "a_package_that_is_not_there", "conservtl.methods")]
        with pytest.raises(ctl.SpecError, match=r"entry point 'theirs' of group 'conservtl\.methods'"):
            as_strategy({"kind": "l2_sp"})
        with pytest.raises(ctl.SpecError, match=r"entry point 'theirs' of group 'conservtl\.methods'"):
            parse_spec({**speech_fields, "strategies": [{"kind": "l2_sp"}]})


NEW_METHOD = '''
"""A method that is new."""
from typing import Annotated, ClassVar, Literal

from conservtl.methods.base import Aliases, Span, Strategy, TestFields
from conservtl.plan.plan import Plan

__all__ = ["NewMethod"]


class NewMethod(Strategy):
    """Scale all rates."""

    kind: Literal["new_method"] = "new_method"
    aliases: ClassVar[Aliases] = {"newest": {"factor": 0.25}}
    test_fields: ClassVar[TestFields] = ({"factor": Span(0.5, 0.75)},)
    factor: float = 0.5
    """Factor on all rates."""

    def apply(self, plan: Plan) -> Plan:
        """Choose the rates."""
        return plan.choose(self.label, "rate", {row.name: {"lr": None, "scale": self.factor} for row in plan.rows})
'''
USES = """
import json, runpy, sys
import conservtl as ctl
from hypothesis import HealthCheck, given, settings
from torch import nn
from conservtl.experiments.spec.spec import parse_spec, schema
from conservtl.methods.new_method import NewMethod
from conservtl.testing import check_strategy, strategies

assert ctl.NewMethod is NewMethod and "NewMethod" in ctl.__all__ and "NewMethod" in dir(ctl)
spec = parse_spec({"task": "speech", "data": {"kind": "espeak"}, "strategies": [{"kind": "newest"}]})
assert spec.strategies == (NewMethod(factor=0.25),)
assert json.loads(schema())["$defs"]["NewMethod"]["properties"]["factor"]["description"] == "Factor on all rates."
drawn = []

@settings(max_examples=200, deadline=None, database=None, derandomize=True)
@given(strategies(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), max_size=1))
def draw(chosen):
    drawn.extend(one for one in chosen if type(one) is NewMethod)

draw()
assert drawn and all(one.factor == 0.5 or 0.5 <= one.factor <= 0.75 for one in drawn)
check_strategy(NewMethod())
assert "import NewMethod as NewMethod" in runpy.run_path(sys.argv[1])["stub"]()
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the project with one file more, and an environment in which it is the package imported."""
    folder = tmp_path_factory.mktemp("project")
    shutil.copytree(ROOT / "conservtl", folder / "conservtl", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "docs", "examples"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    (folder / "tests").mkdir()
    shutil.copy(ROOT / "tests" / "test_readme.py", folder / "tests")
    (folder / "conservtl" / "methods" / "new_method.py").write_text(NEW_METHOD)
    return folder, {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}


class TestNewFile:
    """A new built-in method is one file, its row in the tests and its page."""

    def python(self, copy, *words):
        folder, environment = copy
        command = [sys.executable, *map(str, words)]
        return subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
        )

    def test_it_is_found_everywhere(self, copy):
        done = self.python(copy, "-c", USES, ROOT / "tests" / "write_stub.py")
        assert done.returncode == 0, done.stderr

    def test_a_page_without_it_is_noticed(self, copy):
        done = self.python(copy, "-m", "pytest", "-q", "tests/test_readme.py", "-k", "name_every_strategy")
        assert done.returncode == 1, done.stdout
        assert "NewMethod" in done.stdout

    def test_the_contract_of_independence_covers_it(self, copy):
        """Without an import of another method it is kept, with one it is broken."""
        pytest.importorskip("importlinter")
        lint = ["-c", "from importlinter.cli import lint_imports_command; lint_imports_command()", "--no-cache"]
        assert self.python(copy, *lint).returncode == 0
        path = copy[0] / "conservtl" / "methods" / "new_method.py"
        path.write_text(NEW_METHOD.replace("\n__all__", "from conservtl.methods.l2_sp import L2SP\n\n__all__"))
        done = self.python(copy, *lint)
        path.write_text(NEW_METHOD)
        assert done.returncode == 1
        assert "conservtl.methods.new_method -> conservtl.methods.l2_sp" in done.stdout


def test_built_in_strategies_are_those_of_the_package():
    found = builtin_strategies()
    assert {"L2SP", "FeatureConservation", "LPFT"} <= found.keys()
    assert all(found[name] is getattr(ctl, name) for name in found)
    assert list(found) == sorted(found)


class TestFieldsThatJsonCannotDescribe:
    """One of them would break the schema of all specs."""

    @pytest.mark.parametrize("field", [Callable[[int], int], type, torch.dtype, list[torch.Tensor]])
    def test_the_field_is_named_and_the_class_refused(self, field):
        fields = {"kind": Literal["undescribed"], "alpha": float, "wrong": field}
        with pytest.raises(ctl.SpecError, match=r"Undescribed\.wrong must be of a type that JSON can describe"):
            type("Undescribed", (ctl.Strategy,), {"__annotations__": fields, "kind": "undescribed", "alpha": 1.0})
        assert "undescribed" not in ctl.Strategy.named
        assert "undescribed" not in schema()

    def test_a_field_of_a_section_is_named_by_the_strategys(self):
        section = create_model("Section", __base__=FrozenModel, read=(Callable[[int], int], print))
        fields = {"kind": Literal["undescribed"], "section": section}
        with pytest.raises(ctl.SpecError, match=r"Undescribed\.section must be of a type that JSON can describe"):
            type("Undescribed", (ctl.Strategy,), {"__annotations__": fields, "kind": "undescribed"})

    def test_what_is_no_field_may_be_of_any_type(self):
        class Described(ctl.Strategy):
            kind: Literal["described"] = "described"
            alpha: float = float("inf")
            """JSON has no infinity: the default is left out of the schema."""
            read: ClassVar[Callable[[int], int]] = abs

            def apply(self, plan):
                return plan

        assert Described.named["described"] is Described
        del Described.named["described"]


def _specs(cls=FrozenModel):
    for one in cls.__subclasses__():
        if one.__module__.startswith("conservtl."):
            yield one
            yield from _specs(one)


def test_defaults_are_values_that_their_fields_take():
    """Pydantic does not look at them."""
    assert {*builtin_strategies().values()} <= {*_specs()}
    seen = 0
    for cls in {*_specs()}:
        for name, field in cls.model_fields.items():
            if not field.is_required() and field.default is not None:
                value = field.get_default(call_default_factory=True)
                assert TypeAdapter(Annotated[field.annotation, field]).validate_python(value) == value, (cls, name)
                seen += 1
    assert seen > 200
