"""The plan: its table, its invariants, and one choice for each decision."""

from __future__ import annotations

import pytest
from pydantic import ValidationError
from rich.console import Console
from torch import nn

import conservtl as ctl
from conservtl.methods import apply_all
from conservtl.plan.plan import Plan
from conservtl.plan.row import Phase, Row
from conservtl.testing.choices import whole_plan

TABLE = """\
layer  parameters  origin  state                 rate   pull  decay
─────  ──────────  ──────  ────────────────────  ─────  ────  ─────
0             152  source  frozen                –      –     –
3             584  source  trained from phase 2  × 0.5  0.1   –
8              27  fresh   trained               × 1    –     0.01
─────  ──────────  ──────  ────────────────────  ─────  ────  ─────
763 parameters: 611 trained (80.1 %), 152 frozen
736 copied from the source, 27 fresh
fresh  8: shape differs: (3, 8) here, (10, 8) in the source
source  not used: 2 of 6 tensors, 90 of 826 values (8.weight (10, 8), 8.bias (10,))
phase 1  head: 2 epochs, rates × 1, trains 8
phase 2  all: to the end, rates × 0.5, trains 3, 8"""


def network(classes=3):
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1, bias=False),
        nn.GroupNorm(2, 8, affine=False),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, bias=True),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(),
        nn.Linear(8, classes),
    )


def row(name="a.weight", **fields):
    given = {"layer": name.split(".")[0], "depth": 0.0, "shape": (2, 3), "kind": "weight", "source_shape": (2, 3)}
    return Row(name=name, **{**given, **fields})


def fresh(name="a.weight", **fields):
    return row(name, **{"origin": "fresh", "reason": "missing in the source", "source_shape": None, **fields})


class TestTable:
    def plan(self):
        model = network()
        model[0] = nn.Conv2d(2, 8, 3, padding=1)
        source = network(10)
        source[0] = nn.Conv2d(2, 8, 3, padding=1)
        strategies = [
            ctl.LayerTransfer(layers=1),
            ctl.L2SP(alpha=0.1),
            ctl.DiscriminativeLR(decay=0.5),
            ctl.GradualUnfreezing(epochs=2, scales=(1.0, 0.5)),
        ]
        return ctl.adapt(model, source, strategies).plan

    def test_as_text(self):
        assert str(self.plan()) == TABLE

    def test_on_a_terminal(self):
        console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
        console.print(self.plan())
        lines = console.export_text().splitlines()
        for cells in (["3", "584", "source", "trained from phase 2", "× 0.5", "0.1"], ["8", "27", "fresh"]):
            assert any(all(cell in line for cell in cells) for line in lines)
        console.file.close()

    def test_totals(self):
        assert self.plan().totals() == {"all": 763, "trained": 611, "frozen": 152, "copied": 736, "fresh": 27}


class TestInvariants:
    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            ((row(), row()), r"\['a\.weight'\] stand in several"),
            ((row("a.x"), row("b.x"), row("a.y")), "rows of a layer must stand together"),
            ((row("a.x", depth=1.0), row("b.x", depth=0.0)), "ordered by depth"),
            ((row(reason="because"),), "only fresh rows have one"),
            ((row(origin="fresh"),), "fresh with reason None"),
            ((fresh(pull=0.1),), "no source value to pull it to"),
            ((row(decay=0.1),), "beta acts on fresh parameters only"),
            ((row(source_shape=(3, 2)),), r"shape \(2, 3\), its source \(3, 2\)"),
            ((row(source_shape=None),), "its source None"),
            ((row(source_rows=(None, None)),), "0 of its rows are copied from the source"),
            ((row(source_rows=(0, 0)),), r"must copy each row from one .* received \(0, 0\)"),
            ((row(source_rows=(0, 5)),), r"must copy each row from one .* received \(0, 5\)"),
            ((row(source_rows=(0,)),), r"must copy each row from one .* received \(0,\)"),
        ],
    )
    def test_rows(self, rows, message):
        with pytest.raises(ctl.PlanError, match=message):
            Plan(rows=rows)

    @pytest.mark.parametrize(
        ("phases", "message"),
        [
            ((), "every phase but the last"),
            ((Phase(), Phase()), "every phase but the last needs a number of epochs"),
            ((Phase(frozen=("c",)),), r"freezes \['c'\], which the plan does not have"),
            ((Phase(name="p", frozen=("a.weight", "b.weight")),), "phase 'p' trains nothing"),
        ],
    )
    def test_phases(self, phases, message):
        with pytest.raises(ctl.PlanError, match=message):
            Plan(rows=(row(), row("b.weight"), row("c.weight", frozen=True)), phases=phases)

    @pytest.mark.parametrize(
        "fields",
        [{"lr": 0.0}, {"lr": float("inf")}, {"scale": 0.0}, {"scale": float("nan")}, {"pull": -1.0}, {"depth": 1.5}],
    )
    def test_values(self, fields):
        with pytest.raises(ValidationError):
            row(**fields)

    def test_nothing_can_be_changed(self):
        plan = Plan(rows=(row(),))
        with pytest.raises(ValidationError):
            plan.rows = ()
        with pytest.raises(ValidationError):
            plan.rows[0].frozen = True

    def test_everything_may_be_frozen(self):
        assert Plan(rows=(row(frozen=True),)).trained == ()


class TestChoose:
    plan = Plan(rows=(row(), row("b.weight")))

    def rate(self, plan, by, value, *, explicit, names=("a.weight",)):
        return plan.choose(by, "rate", {name: {"scale": value} for name in names}, explicit=explicit)

    @pytest.mark.parametrize("explicit_first", [True, False])
    def test_explicit_wins_over_everything(self, explicit_first):
        one = {"by": "One", "value": 0.5, "explicit": True}
        all_ = {"by": "All", "value": 0.1, "explicit": False, "names": ("a.weight", "b.weight")}
        plan = self.plan
        for choice in (one, all_) if explicit_first else (all_, one):
            plan = self.rate(plan, **choice)
        assert [r.scale for r in plan.rows] == [0.5, 0.1]
        assert plan["a.weight"].chosen["rate"].by == "One"

    def test_two_explicit_choices_are_refused_and_both_named(self):
        plan = self.rate(self.plan, "One", 0.5, explicit=True)
        with pytest.raises(ctl.PlanError, match=r"Two and One both choose the rate of 'a\.weight' \(layer 'a'\)"):
            self.rate(plan, "Two", 0.5, explicit=True)
        other_row = self.rate(plan, "Two", 0.25, explicit=True, names=("b.weight",))
        assert [r.scale for r in other_row.rows] == [0.5, 0.25]

    def test_two_for_everything_must_agree(self):
        plan = self.rate(self.plan, "One", 0.5, explicit=False)
        assert self.rate(plan, "Two", 0.5, explicit=False)["a.weight"].scale == 0.5
        with pytest.raises(ctl.PlanError, match="Two and One"):
            self.rate(plan, "Two", 0.25, explicit=False)

    def test_other_columns_are_other_decisions(self):
        plan = self.rate(self.plan, "One", 0.5, explicit=True)
        plan = plan.choose("Two", "frozen", {"a.weight": {"frozen": True}})
        assert plan["a.weight"].frozen
        assert plan["a.weight"].scale == 0.5
        assert plan.trained == ("b.weight",)

    @pytest.mark.parametrize("fields", [{"scale": 0.0}, {"lr": float("inf")}, {"scale": "fast"}])
    def test_values_that_no_row_can_hold(self, fields):
        """A rate that has underflowed to 0 is found here and not by the optimizer."""
        with pytest.raises(ctl.PlanError, match=rf"Mine gives 'a\.weight' {next(iter(fields))}="):
            self.plan.choose("Mine", "rate", {"a.weight": fields})

    @pytest.mark.parametrize(
        ("column", "values"),
        [
            ("rate", {"c": {"scale": 0.5}}),
            ("rat", {"a.weight": {"scale": 0.5}}),
            ("rate", {"a.weight": {"sclae": 1.0}}),
        ],
    )
    def test_what_the_plan_does_not_have(self, column, values):
        """A strategy's typing error is no silence."""
        with pytest.raises(ctl.PlanError, match=rf"Mine chooses the {column} of '{next(iter(values))}'"):
            self.plan.choose("Mine", column, values)

    def test_what_wins_starts_from_the_defaults_of_its_column(self):
        """An absolute rate for everything does not shine through a ratio that names the row."""
        plan = self.plan.choose("All", "rate", {"a.weight": {"lr": 1e-3}}, explicit=False)
        plan = plan.choose("One", "rate", {"a.weight": {"scale": 0.5}})
        assert plan["a.weight"].rate(0.1) == 0.05

    def test_phases_are_set_once(self):
        plan = self.plan.with_phases("One", [Phase(name="head", epochs=1, frozen=("a.weight",)), Phase()])
        with pytest.raises(ctl.PlanError, match=r"Two sets phases, but another strategy has set \['head', 'all'\]"):
            plan.with_phases("Two", [Phase(epochs=1), Phase()])


class TestReading:
    plan = Plan(
        rows=(row(), row("b.weight", depth=0.5, frozen=True), fresh("c.weight", depth=1.0)),
        phases=(Phase(epochs=1, frozen=("a.weight",)), Phase(epochs=1), Phase(frozen=("c.weight",))),
    )

    def test_head_and_what_has_most_to_learn(self):
        """The head is the last weight's module, without the norm that joined its layer."""
        assert self.plan.head == ("c.weight",)
        assert self.plan.new == self.plan.fresh == ("c.weight",)
        model = nn.Sequential(nn.Linear(2, 2), nn.ModuleDict({"norm": nn.LayerNorm(2), "out": nn.Linear(2, 2)}))
        plan = whole_plan(model)
        assert plan.head == plan.new == ("1.out.weight", "1.out.bias")
        assert plan.fresh == ()

    @pytest.mark.parametrize("module", [nn.LayerNorm(3), nn.PReLU()])
    def test_the_head_of_a_model_without_weights(self, module):
        """A norm alone is adapted too."""
        assert whole_plan(nn.Sequential(module)).head

    def test_select_layers_or_else_parameters(self):
        found = self.plan.select(["[ab]", "c.weight"])
        assert found == {"[ab]": ("a.weight", "b.weight"), "c.weight": ("c.weight",)}
        with pytest.raises(ctl.SelectorError, match="'d'"):
            self.plan.select(["d"])

    def test_frozen_in_a_phase(self):
        assert self.plan.frozen_in(0) == {"a.weight", "b.weight"}
        assert self.plan.frozen_in(1) == {"b.weight"}
        assert self.plan.trained == ("a.weight", "c.weight")

    def test_a_parameter_no_phase_trains(self):
        phases = (Phase(epochs=1, frozen=("a.weight",)), Phase(frozen=("a.weight",)))
        assert Plan(rows=self.plan.rows, phases=phases).trained == ("c.weight",)

    def test_rows_by_name_and_layer(self):
        assert self.plan["b.weight"].frozen
        with pytest.raises(KeyError):
            self.plan["d"]
        assert self.plan == Plan(**dict(self.plan))  # looking a row up leaves no trace
        assert [(layer, len(rows)) for layer, rows in self.plan.by_layer()] == [("a", 1), ("b", 1), ("c", 1)]

    def test_depth_counts_frozen_layers_too(self):
        """0 at the input side and 1 at the output side, whatever is trained."""
        model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(5)))
        plan = apply_all(whole_plan(model), [ctl.LayerTransfer(layers=2), ctl.L2SP(alpha=1.0, depth=(0, 1))])
        assert [plan[f"{i}.weight"].depth for i in range(5)] == [0, 0.25, 0.5, 0.75, 1]
        assert [plan[f"{i}.weight"].pull for i in range(5)] == [0, 0.25, 0.5, 0.75, 1]
        assert Plan(rows=(row(),)).rows[0].depth == 0


class TestJSON:
    def test_both_ways(self):
        plan = TestTable().plan()
        assert Plan.model_validate_json(plan.model_dump_json()) == plan
        assert Plan(**plan.model_dump(mode="json")) == plan
        assert plan != self.other()

    def other(self):
        return ctl.adapt(network(), network().state_dict()).plan

    def test_unknown_fields_are_refused(self):
        dumped = TestTable().plan().model_dump(mode="json")
        with pytest.raises(ValidationError, match="no_such"):
            Plan(**dumped, no_such=1)
