"""The page of a sweep."""

import re

import pytest

from conservtl.report import write_sweep
from conservtl.report.figures.depths import by_depth
from conservtl.report.figures.strengths import strength_curve
from conservtl.report.pages.sweep_page import free_layers, sweep_sentences
from conservtl.report.text.intervals import MeanInterval


def points(*means):
    return {n: MeanInterval(mean, mean, mean, 1) for n, mean in enumerate(means) if mean is not None}


class TestSentences:
    def test_the_side_the_layers_and_the_strength(self, results):
        side, holding, strength = sweep_sentences(results["sweep"]())
        assert re.fullmatch(
            r"The output side transfers better: held, target accuracy is 68\.\d % against 45\.\d % from the input "
            r"side, over 1 to 3 layers\.",
            side,
        )
        assert holding == (
            "Held instead of fine-tuned, up to 2 of 4 layers from the output side cost the target less than a "
            "point; the first from the input side more."
        )
        assert re.fullmatch(
            r"Of the strengths of l2_sp, 1 has the best harmonic mean, 97\.0 % \(target 95\.\d %, source 98\.\d %\); "
            r"the path to fine-tuned weights reaches 9\d\.\d %, at t = 1\.",
            strength,
        )

    def test_sides_that_differ_by_less_than_a_point_are_alike(self, results):
        result = results["sweep"]()
        by = {(curve["side"], curve["form"]): curve for curve in result["curves"]}
        by["input", "AnB"]["points"] = by["output", "AnB"]["points"]
        assert sweep_sentences(result)[0].startswith("Both sides transfer alike")

    def test_without_source_the_target_decides(self, results):
        said = sweep_sentences(results["sweep"](source=False))[2]
        assert "has the best target accuracy" in said
        assert "source" not in said

    def test_nothing_measured_says_nothing(self):
        assert sweep_sentences({"layers": ["a"], "curves": [], "strengths": [], "path": []}) == []


class TestFreeLayers:
    def test_up_to_the_first_that_costs(self):
        assert free_layers(points(20, 50, 60, 65, 80), points(20, 50.5, 60.9, 66, 80)) == (2, 3)

    def test_all_or_none(self):
        assert free_layers(points(20, 50, 60), points(20, 50, 60)) == (2, 0)
        assert free_layers(points(20, 50), points(20, 60)) == (0, 1)

    def test_layers_that_bring_nothing_do_not_count(self):
        """At chance, holding is free and says nothing."""
        assert free_layers(points(10, 10, 82), points(10, 10.2, 96)) == (0, 2)

    def test_only_numbers_measured_in_both(self):
        assert free_layers(points(20, None, 50, 60), points(20, 40, 50.1)) == (2, 0)


class TestPage:
    def test_it_holds_the_pictures_and_the_numbers(self, written, results):
        html = written(write_sweep, results["sweep"]())
        assert html.count("<svg") == 3
        assert (
            html.index("How far layers transfer") < html.index("What is left of the source") < html.index("How strong")
        )
        assert html.count("Bands: 95 % intervals of the mean.") == 2
        assert "Bands and bars: 95 % intervals of the mean." in html
        for text in ("target accuracy (%)", "source accuracy (%)", "layers transferred from the output side"):
            assert f">{text}<" in html

    def test_without_source_data(self, written, results):
        html = written(write_sweep, results["sweep"](source=False))
        assert html.count("<svg") == 2
        assert "Not measured: what the source keeps" in html
        assert "t (0: the source, 1: fine-tuned)" in html

    def test_one_run_each_has_no_intervals(self, written, results):
        html = written(write_sweep, results["sweep"](seeds=1))
        assert "intervals of the mean" not in html
        assert "One run each: no intervals." in html

    @pytest.mark.parametrize("part", ["curves", "strengths", "path"])
    def test_any_part_can_be_missing(self, written, results, part):
        html = written(write_sweep, results["sweep"]() | {part: []})
        assert "How strong" in html or "How far layers transfer" in html

    def test_nothing_at_all(self, written, results):
        empty = results["sweep"]() | {"curves": [], "strengths": [], "path": []}
        assert "There are no runs to summarise." in written(write_sweep, empty)

    def test_many_layers_with_long_names(self, written, results):
        layers = [f"encoder.layers.{i}.attention.out_proj" for i in range(52)]
        html = written(write_sweep, results["sweep"](layers=layers, controls=False))
        assert "53 rows" in html
        assert "Grey: controls" not in html


class TestPictures:
    def test_layers_are_named_from_their_side(self, results):
        """From the output side the first layer that is transferred is the last of the model."""
        svg = by_depth(results["sweep"](), "target").svg
        names = re.findall(r">(\w[\w.]*  \d)<", svg)
        assert names == [
            "stem  1",
            "blocks.0  2",
            "blocks.1  3",
            "head  4",
            "head  1",
            "blocks.1  2",
            "blocks.0  3",
            "stem  4",
        ]

    def test_strength_nought_has_a_place_on_the_logarithmic_axis(self, results):
        svg = strength_curve(results["sweep"]()).svg
        at = {}
        for text, tick in re.findall(r"(<text[^>]*>)([\d.]+)<", svg):
            at.setdefault(tick, float(re.search(r'(?: x="|translate\()([\d.]+)', text)[1]))
        # A decade left of the least that has one, and as far from it as 1 is on the other side.
        assert at["0.1"] - at["0"] == pytest.approx(at["1"] - at["0.1"], rel=0.01)
        assert at["100"] > at["1"]
        assert "strength of l2_sp (log scale)" in svg

    def test_one_side_alone(self, results):
        result = results["sweep"]()
        result["curves"] = [curve for curve in result["curves"] if curve["side"] == "output"]
        svg = by_depth(result, "target").svg
        assert "from the output side" in svg
        assert "from the input side" not in svg
