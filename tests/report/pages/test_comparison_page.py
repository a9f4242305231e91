"""The page of a comparison."""

import copy
import re

import pytest

from conservtl.report import write_compare
from conservtl.report.figures.by_target import SHOWN, by_target
from conservtl.report.figures.frontier import frontier
from conservtl.report.figures.shots import NAMED, error_by_shots


def cells(html, name):
    """The row of a table that begins with a name, as text."""
    for row in re.findall(r"<tr[^>]*>(.*?)</tr>", html, flags=re.DOTALL):
        found = [re.sub(r"<[^>]+>", " ", cell).split() for cell in re.findall(r"<td[^>]*>(.*?)</td>", row, re.DOTALL)]
        if found and name in " ".join(found[0]):
            return [" ".join(cell) for cell in found]
    raise AssertionError(name)


class TestPage:
    def test_it_says_what_was_found(self, written, results):
        result = results["compare"](shots=(1, 5, 10))
        html = written(write_compare, result)
        sentence = result["verdict"][1].replace(" points", "\u00a0points")
        assert re.search(rf"<h1[^>]*>{re.escape(sentence)}</h1>", html)  # the spec's own number of shots
        assert all(verdict.replace(" points", "\u00a0points") in html for verdict in result["verdict"])
        assert html.count("<svg") == 5  # three frontiers, the shots, the targets
        assert html.index("5 shots a class") < html.index("1 shot a class") < html.index("10 shots a class")
        assert html.index("<svg") < html.index("<table")

    def test_the_table_holds_means_with_intervals(self, written, results):
        result = results["compare"]()
        html = written(write_compare, result)
        row = next(row for row in result["tables"][0]["rows"] if row["variant"] == "L2-SP then interpolation")
        said = cells(html, "L2-SP then interpolation")
        for at, key in ((1, "target"), (2, "source"), (3, "harmonic")):
            found = {name: 100 * row[key][name] for name in ("mean", "low", "high")}
            found["high"] = min(100.0, found["high"])
            assert said[at] == f"{found['mean']:.1f} {found['low']:.1f}–{found['high']:.1f}"
        gap = row["difference"]
        assert said[5] == f"{100 * gap['mean']:+.1f} {100 * gap['low']:+.1f} to {100 * gap['high']:+.1f}"
        assert said[4] == "0.41"
        assert said[7] == "20"
        assert cells(html, "fine-tuning, interpolated")[0].endswith("the best baseline")

    def test_the_best_stands_first(self, written, results):
        html = written(write_compare, results["compare"]())
        table = html[html.index("<tbody>") :]
        assert table.index("joint training") < table.index("L2-SP then interpolation") < table.index("from scratch")

    def test_without_source_data(self, written, results):
        """The picture is of the target alone, the columns of the source are gone, and the page says why."""
        result = results["compare"](source=False)
        html = written(write_compare, result)
        assert "Target accuracy, 5 shots a class" in html
        assert "Not measured: source kept" in html
        assert "harmonic mean (%)" not in html
        assert len(cells(html, "L2-SP then interpolation")) == 5

    def test_one_run_each_has_no_intervals_and_says_so(self, written, results):
        html = written(write_compare, results["compare"](seeds=1, targets=("theo",)))
        assert "One run each, so there are no intervals." in html
        assert "Target by target" not in html
        assert re.fullmatch(r"\d+\.\d", cells(html, "L2-SP then interpolation")[1])

    def test_a_loss_a_win_and_neither_colour_the_sentence(self, written, results):
        def tone(wins, low, high):
            result = copy.deepcopy(results["compare"](own={"mine": (0.96, 0.98)}))
            row = result["tables"][0]["rows"][-1]
            row["wins"], row["difference"] = wins, {"mean": (low + high) / 2, "low": low, "high": high, "count": 20}
            return re.search(r'<h1 class="(\w+)"', written(write_compare, result))[1]

        assert tone(wins=True, low=0.01, high=0.02) == "better"
        assert tone(wins=False, low=-0.01, high=0.02) == "same"
        assert tone(wins=False, low=-0.02, high=-0.01) == "worse"

    def test_no_baselines_and_no_runs(self, written, results):
        result = results["compare"]()
        table = result["tables"][0]
        table["rows"] = [row | {"difference": None, "wins": False} for row in table["rows"] if not row["baseline"]]
        table["best_baseline"] = None
        assert "against the best baseline" not in written(write_compare, result)
        assert "no runs" in written(write_compare, result | {"tables": [], "verdict": []})

    def test_names_are_text_whatever_they_hold(self, written, results):
        evil = "<script>$x_1$</script>"
        html = written(write_compare, results["compare"](own={evil: (0.96, 0.98)}, targets=(evil, "b")))
        assert "&lt;script&gt;$x_1$" in html

    def test_it_is_the_same_each_time_and_leaves_its_input(self, written, results):
        result = results["compare"]()
        given = copy.deepcopy(result)
        assert written(write_compare, result) == written(write_compare, result)
        assert result == given


class TestFrontier:
    def test_what_lies_beyond_the_edge_has_its_value_written(self, results):
        svg = frontier(results["compare"]()["tables"][0], "f").svg
        assert re.search(r">from scratch \(source \d\d\.\d %, target \d\d\.\d %\)<", svg)
        assert re.search(r">source as it is \(target 8\d\.\d %\)<", svg)

    def test_axes_are_named_with_units(self, results):
        svg = frontier(results["compare"]()["tables"][0], "f").svg
        assert ">source accuracy kept (%)<" in svg
        assert ">target accuracy (%)<" in svg
        assert "harmonic mean<" in svg


class TestShots:
    def test_one_number_of_shots_is_no_curve(self, results):
        tables = results["compare"]()["tables"]
        assert error_by_shots(tables, tables[0]) is None

    def test_the_best_are_named_and_the_rest_are_not(self, results):
        tables = results["compare"](shots=(1, 5, 10))["tables"]
        picture = error_by_shots(tables, tables[1])
        names = set(re.findall(r">([^<>]+)</text>", picture.svg))
        assert {"L2-SP then interpolation", "source as it is", "fine-tuning, interpolated"} <= names
        assert not names & {"from scratch", "linear probe", "joint training"}
        assert f"the {17 - NAMED - 2} others" in picture.caption
        assert {"1", "5", "10", "target error (%, log scale)", "source error (%, log scale)"} <= names

    def test_no_error_at_all_has_a_place(self, results):
        tables = results["compare"](shots=(1, 5), own={"mine": (1.0, 1.0)})["tables"]
        for table in tables:
            table["rows"][-1]["target"] = {"mean": 1.0, "low": 1.0, "high": 1.0, "count": 20}
        assert ">0<" in error_by_shots(tables, tables[0]).svg


class TestTargets:
    def test_each_target_has_the_difference_of_both(self, results):
        table = results["compare"]()["tables"][0]
        rows = {row["variant"]: row["per_target"] for row in table["rows"]}
        svg = by_target(table).svg
        for name in ("jackson", "theo"):
            both = [
                rows[row][name]["after"]["mean"] for row in ("L2-SP then interpolation", "fine-tuning, interpolated")
            ]
            assert f">{name}<" in svg
            assert f">{100 * (both[0] - both[1]):+.1f}<".replace("-", "−") in svg

    def test_of_many_those_that_differ_most(self, results):
        picture = by_target(results["compare"](seeds=1, targets=[f"speaker-{n}" for n in range(60)])["tables"][0])
        assert len(set(re.findall(r">(speaker-\d+)<", picture.svg))) == SHOWN
        assert "Of 60 targets, the 20 that differ most." in picture.caption

    def test_plain_numbers_will_do(self, results):
        """Without intervals the caption mentions none."""
        table = results["compare"]()["tables"][0]
        for row in table["rows"]:
            row["per_target"] = {name: {"before": 0.8, "after": 0.9} for name in ("a", "b")}
        assert "95 %" not in by_target(table).caption

    @pytest.mark.parametrize("targets", [(), ("theo",)])
    def test_fewer_than_two_are_no_picture(self, results, targets):
        table = results["compare"]()["tables"][0]
        for row in table["rows"]:
            row["per_target"] = {name: {"before": 0.8, "after": 0.9} for name in targets}
        assert by_target(table) is None
