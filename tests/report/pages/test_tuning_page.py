"""The page of a search."""

import re

import pytest

from conservtl.report import write_tune
from conservtl.report.figures.trials import over_time, trials_of
from conservtl.report.pages.tuning_page import at_the_end, tune_sentence


class TestPage:
    def test_one_objective(self, written, results):
        result = results["tune"]()
        html = written(write_tune, result)
        (best,) = result["best"]
        score = 100 * result["trials"][best]["values"][0]
        assert f"Of 20 trials, number {best} is the best: harmonic mean {score:.1f}\u00a0%" in html
        assert html.count("<svg") == 2
        assert html.index("What each field does") < html.index("The best trials") < html.index("The search")
        assert re.search(rf'<tr class="strong">\s*<td class="">#{best}</td>', html)
        for name in ("strategies.0.alpha (log scale)", "training.epochs", "strategies.0.mode", "coupled"):
            assert f">{name}<" in html
        assert "no intervals" in html

    def test_both_objectives_have_a_front(self, written, results):
        result = results["tune"]("both", 30)
        html = written(write_tune, result)
        assert f"{len(result['best'])} are on the Pareto front" in html
        assert html.index("What the target gains") < html.index("On the Pareto front") < html.index("What each field")
        assert all(f">#{number}<" in html for number in result["best"])
        rows = re.findall(r"<td class=\"\">#(\d+)</td>", html)
        assert sorted(map(int, rows)) == result["best"]

    def test_what_did_not_come_to_an_end_is_said(self, written, results):
        html = written(write_tune, results["tune"]())
        assert "Not complete: 1 failed, 2 stopped early." in html
        assert "1 trial failed: training.epochs: 10.5 is not whole." in html

    def test_target_alone(self, written, results):
        html = written(write_tune, results["tune"]("target"))
        assert "target accuracy (%)" in html
        assert "source kept" not in html

    def test_no_trial_and_none_complete(self, written, results):
        assert "There are no trials yet." in written(write_tune, results["tune"](trials=0))
        result = results["tune"](trials=3) | {"best": []}
        result["trials"] = [
            {"number": n, "state": "pruned", "values": [0.5], "params": trial["params"], "target": None, "source": None}
            for n, trial in enumerate(result["trials"])
        ]
        html = written(write_tune, result)
        assert "None of 3 trials" not in html  # a word that reads like a missing value
        assert "No trial of 3 is complete" in html

    def test_many_fields_with_long_names_share_a_column(self, written, results):
        fields = {f"strategies.{i}.a_rather_long_field_name": {"low": 0.1, "high": 1.0, "log": True} for i in range(7)}
        fields["model.name"] = {"choices": ["a_very_long_model_name_resnet18", "resnet50", "vit_base_patch16_224"]}
        html = written(write_tune, results["tune"](fields=fields))
        assert "<th>settings</th>" in html
        assert "strategies.6.a_rather_long_field_name = " in html

    def test_a_pruned_trial_is_no_best_so_far(self, results):
        """Its last score is shown and is never taken for a result."""
        result = results["tune"]()
        result["trials"][5]["values"] = [0.999]
        found = trials_of(result)
        assert found[5].score == pytest.approx(99.9)
        assert not found[5].complete
        assert "99.9" not in tune_sentence(result)
        assert "best so far 99.9" not in over_time(result, found).svg


class TestEnds:
    def test_near_the_end_of_a_range(self):
        log = {"low": 1e-4, "high": 1.0, "log": True}
        assert at_the_end(0.9, log)
        assert at_the_end(1.2e-4, log)
        assert not at_the_end(0.01, log)
        assert not at_the_end(0.01, {"low": 0.0, "high": 0.02, "log": False})
        assert not at_the_end("a", {"choices": ["a", "b"]})

    def test_it_is_said(self, written, results):
        result = results["tune"]()
        result["trials"][result["best"][0]]["params"]["training.epochs"] = 60
        html = written(write_tune, result)
        assert (
            "training.epochs = 60 lies at the end of its range (10 to 60): a wider range may hold a better value."
            in html
        )
