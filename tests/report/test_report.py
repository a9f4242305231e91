"""The report of a run: its sentence, its self-contained page, its JSON file."""

import copy
import doctest
import html
import json
import math
import os
import re
from enum import StrEnum
from html.parser import HTMLParser
from pathlib import Path

import pytest
from torch import nn

import conservtl as ctl
from conservtl import extras
from conservtl.errors import MissingExtraError
from conservtl.experiments.run.runner import run
from conservtl.experiments.spec.spec import parse_spec
from conservtl.layers import Layer, ParameterInfo
from conservtl.plan.plan import Phase, Plan
from conservtl.report import sentence, write_html, write_json
from conservtl.report.figures import canvas
from conservtl.report.figures.curves import weight_path
from conservtl.report.figures.drift import drift_by_layer
from conservtl.report.text import summary

LAYERS = ("conv1", "conv2", "head")


def a_plan(layers=LAYERS, *, phases=True):
    """Convolutions of 296 parameters each: "conv1" frozen, "head" fresh, the others pulled toward the source."""
    parts = {
        layer: [ParameterInfo(f"{layer}.weight", (8, 4, 3, 3), "weight"), ParameterInfo(f"{layer}.bias", (8,), "bias")]
        for layer in layers
    }
    names = {layer: [part.name for part in found] for layer, found in parts.items()}
    shapes = {part.name: part.shape for layer, found in parts.items() if layer != "head" for part in found}
    plan = Plan.draw(
        [Layer(layer, tuple(found), (layer,)) for layer, found in parts.items()],
        shapes,
        dict.fromkeys(names["head"], "shape differs"),
    )
    plan = plan.choose("LayerTransfer", "frozen", {name: {"frozen": True} for name in names.get("conv1", ())})
    pulled = [name for layer in layers if layer not in ("conv1", "head") for name in names[layer]]
    plan = plan.choose("L2SP", "pull", {name: {"pull": 0.1} for name in pulled})
    plan = plan.choose("L2SP", "decay", {name: {"decay": 0.01} for name in names["head"]})
    if phases:
        head = Phase(name="head", epochs=2, frozen=tuple(names["conv2"]))
        plan = plan.with_phases("GradualUnfreezing", [head, Phase(scale=0.5)])
    return plan.model_dump(mode="json")


def a_report(layers=LAYERS, *, phases=True, **changes):
    """A report with every part: conv1 frozen, a fresh head, source and target measured."""
    labels = ["zero", "one", "two"]
    return {
        "target": "jackson",
        "shots": 5,
        "example": "recording",
        "classes": True,
        "before": {"target": {"accuracy": 0.7236, "loss": 0.9}, "source": {"accuracy": 0.994, "loss": 0.02}},
        "after": {"target": {"accuracy": 0.9751, "loss": 0.1}, "source": {"accuracy": 0.989, "loss": 0.05}},
        "agreement": {"before": {"agreement": 1.0, "kl": 0.0}, "after": {"agreement": 0.8, "kl": 0.31}},
        "per_class": {
            "target": {
                "labels": labels,
                "before": [0.5, 0.7, 0.9],
                "after": [0.9, 0.6, 1.0],
                "counts": [45, 45, 45],
            },
            "source": None,
        },
        "drift": {layer: 0.01 * place for place, layer in enumerate(layers) if layer != "head"},
        "plan": a_plan(layers, phases=phases),
        "spec": {"task": "speech", "seed": 0, "data": {"target": "jackson", "shots": 5}},
        "environment": {"conservtl": "0.1.0", "torch": "2.11.0", "device": "cpu"},
        "seconds": {"source": 20.1, "adapt": 14.2, "total": 36.0},
    } | changes


def a_history(epochs=4):
    return [
        {
            "epoch": epoch,
            "step": 10 * epoch,
            "phase": "head" if epoch <= 2 else "all",
            "loss": 1.0 / epoch,
            "lr": 1e-3,
            "target": {"accuracy": 0.9751 - 0.2 / epoch},
            "source": {"accuracy": 0.99},
            "seconds": 1.0,
        }
        for epoch in range(1, epochs + 1)
    ]


def measured(before, after, *, source=None, metric="accuracy"):
    """The parts of a report that hold one metric."""
    sides = {"before": {"target": {metric: before}}, "after": {"target": {metric: after}}}
    if source:
        sides["before"]["source"], sides["after"]["source"] = {metric: source[0]}, {metric: source[1]}
    return sides


def page(tmp_path, report, history=()):
    path = tmp_path / "report.html"
    write_html(report, history, path)
    return path.read_text(encoding="utf-8")


class TestSentence:
    def test_a_gain_is_told_with_its_price_and_its_cost(self):
        assert sentence(a_report()) == (
            "Adapted to jackson from 5 recordings a class: target accuracy 72.4 % → 97.5 % (+25.1 points); "
            "source kept 98.9 % of 99.4 % (−0.5 points). 67 % of 888 parameters trained in 14 s."
        )

    def test_a_loss_is_said_plainly(self):
        said = sentence(a_report(**measured(0.9, 0.85, source=(0.99, 0.99))))
        assert said.startswith("Adapting to jackson from 5 recordings a class made the target worse: ")
        assert "90.0 % → 85.0 % (−5.0 points)" in said
        assert "source kept 99.0 % of 99.0 % (±0.0 points)" in said

    def test_no_change_is_no_gain(self):
        """A difference smaller than the last written digit is no change."""
        said = sentence(a_report(**measured(0.9, 0.9004)))
        assert "did not improve the target" in said
        assert "(±0.0 points)" in said

    def test_a_gain_that_cost_the_source_more_says_so(self):
        assert "The source lost more than the target gained." in sentence(
            a_report(**measured(0.80, 0.85, source=(0.99, 0.60)))
        )
        assert "lost more" not in sentence(a_report())

    def test_without_source_data_the_source_model_stands_in(self):
        said = sentence(a_report(**measured(0.7, 0.9)))
        assert "without source data, agreement with the source model 100.0 % → 80.0 % (KL 0.31)" in said
        assert "source not measured" in sentence(a_report(**measured(0.7, 0.9), agreement=None))
        said = sentence(a_report(**measured(0.7, 0.9), examples={"source_train": 3}))
        assert "with nothing of the source held out, agreement with" in said

    def test_a_lower_word_error_rate_is_better(self):
        """A task without classes counts its shots as a whole."""
        better = sentence(a_report(classes=False, **measured(0.41, 0.24, source=(0.10, 0.12), metric="wer")))
        assert better.startswith("Adapted to jackson from 5 recordings: target word error rate 41.0 % → 24.0 %")
        assert "source word error rate 10.0 % → 12.0 % (+2.0 points)" in better
        assert "made the target worse" in sentence(a_report(**measured(0.24, 0.41, metric="wer")))

    @pytest.mark.parametrize(
        ("example", "shots", "words"),
        [
            ("recording", 1, "from 1 recording a class"),
            ("image", 2, "from 2 images a class"),
            ("example", 3, "from 3 examples a class"),
            ("recording", None, "Adapted to jackson: "),
        ],
    )
    def test_shots_are_what_the_task_calls_them(self, example, shots, words):
        assert words in sentence(a_report(example=example, shots=shots))

    @pytest.mark.parametrize(
        ("seconds", "words"), [(0.42, "0.4 s"), (14.2, "14 s"), (125, "2 min 05 s"), (7325, "2 h 02 min")]
    )
    def test_durations_are_as_a_person_says_them(self, seconds, words):
        assert summary.duration(seconds) == words

    def test_what_is_not_there_is_not_made_up(self):
        said = sentence({"target": "x", "after": {"target": {"accuracy": 0.5}}})
        assert said == "Adapted to x: target accuracy 50.0 % after (not measured before); source not measured."
        assert "target not measured" in sentence({})
        assert "target not measured" in sentence(measured(math.nan, math.nan))

    @pytest.mark.parametrize("module", [summary, canvas])
    def test_examples_in_docstrings_hold(self, module):
        assert doctest.testmod(module).failed == 0


class TestPage:
    def test_it_needs_nothing_else(self, tmp_path):
        html = page(tmp_path, a_report(), a_history())
        assert not re.search(r"https?://|<script|<link|@import|<img|<metadata", html)
        assert all(address.startswith("#") for address in re.findall(r'(?:href|src)="([^"]*)"', html))
        assert re.findall(r"url\((?!#)", html) == []

    def test_every_id_is_unique_and_every_reference_is_met(self, tmp_path):
        html = page(tmp_path, a_report(), a_history())
        ids = re.findall(r'\sid="([^"]*)"', html)
        assert len(ids) == len(set(ids)) > 0
        assert set(re.findall(r'href="#([^"]*)"|url\(#([^)]*)\)', html)) <= {(i, "") for i in ids} | {
            ("", i) for i in ids
        }

    def test_it_says_the_numbers(self, tmp_path):
        report = a_report()
        html = page(tmp_path, report, a_history())
        for text in (sentence(report), "72.4 %", "97.5 %", "+25.1 points", "−0.5 points", "80.0 %", "0.310"):
            assert text in html
        for text in ("888", "shape differs", "× 1", "seed: 0", "2.11.0", "45 test examples a target class"):
            assert text in html
        assert html.count("<svg") == 3

    def test_it_is_well_formed(self, tmp_path):
        """Every element that is opened is closed, in order."""
        void = {"meta", "br", "use", "path"}

        class Balance(HTMLParser):
            open: list[str] = []  # noqa: RUF012

            def handle_starttag(self, tag, attrs):
                if tag not in void:
                    self.open.append(tag)

            def handle_startendtag(self, tag, attrs):
                pass

            def handle_endtag(self, tag):
                if tag not in void:
                    assert self.open.pop() == tag

        parser = Balance()
        parser.feed(page(tmp_path, a_report(), a_history()))
        assert parser.open == []

    def test_names_are_text_whatever_they_hold(self, tmp_path):
        """In tables, in pictures and for screen readers."""
        evil = "<script>alert('$x$')</script>"
        report = a_report(layers=("conv1", evil, "head"), phases=False, target=evil, spec={"task": evil})
        report["per_class"]["target"]["labels"] = [evil, "$x_1$", "日本語"]
        html = page(tmp_path, report, a_history())
        assert "<script" not in html
        assert "&lt;script&gt;" in html
        assert "$x_1$" in html
        assert "日本語" in html

    @pytest.mark.parametrize("part", ["agreement", "per_class", "drift", "plan", "spec", "environment", "seconds"])
    def test_any_part_can_be_missing(self, tmp_path, part):
        report = a_report()
        del report[part]
        html = page(tmp_path, report, a_history())
        assert "97.5 %" in html
        assert "None" not in html

    def test_missing_parts_can_be_none(self, tmp_path):
        parts = ("agreement", "per_class", "drift", "plan", "spec", "environment", "seconds")
        html = page(tmp_path, a_report(**dict.fromkeys(parts)), a_history())
        assert "97.5 %" in html
        assert "None" not in html

    def test_almost_everything_can_be_missing(self, tmp_path):
        assert "50.0 %" in page(tmp_path, {"after": {"target": {"accuracy": 0.5}}})
        assert "target not measured" in page(tmp_path, {})

    def test_without_source_data(self, tmp_path):
        report = a_report()
        report["before"]["source"] = None
        del report["after"]["source"]
        history = [{k: v for k, v in entry.items() if k != "source"} for entry in a_history()]
        assert "agreement with the source model" in page(tmp_path, report, history)

    def test_one_epoch_and_epochs_without_evaluation(self, tmp_path):
        assert page(tmp_path, a_report(), a_history(1)).count("<svg") == 3
        history = a_history()
        del history[1]["target"], history[1]["source"]
        history[2]["target"] = None
        history[3]["loss"] = math.nan
        assert page(tmp_path, a_report(), history).count("<svg") == 3

    def test_the_epoch_that_was_kept_is_marked(self, tmp_path):
        report, history = a_report(), a_history()
        history[1]["target"] = dict(report["after"]["target"])
        assert "Ring: the epoch that was kept." in page(tmp_path, report, history)
        assert "Ring:" not in page(tmp_path, a_report(), a_history())

    def test_word_error_rates(self, tmp_path):
        history = [{"epoch": 1, "phase": "all", "target": {"wer": 0.24}}]
        html = page(tmp_path, a_report(**measured(0.41, 0.24, metric="wer")), history)
        assert "word error rate (%)" in html
        assert "lower is better" in html

    def test_sixty_layers(self, tmp_path):
        layers = ("conv1", *(f"encoder.layers.{i}.attention.out_proj" for i in range(58)), "head")
        report = a_report(layers=layers, phases=False)
        html = page(tmp_path, report)
        assert "60 layers" in html
        assert "e.l.57.attention.out_proj" in html
        assert "encoder.layers.57.attention.out_proj" in html

    def test_hundreds_of_layers_name_some(self):
        report = a_report(layers=[*(f"layer{i}" for i in range(299)), "head"], phases=False)
        picture = drift_by_layer(report)
        assert "every 5th named" in picture.svg

    def test_of_a_thousand_classes_those_that_changed_most(self, tmp_path):
        """And the page says that it does not show all."""
        labels = [f"class-{i}" for i in range(1000)]
        after = [0.5 + 0.0001 * i for i in range(1000)]
        after[7] = 0.0
        given = {"labels": labels, "before": [0.5] * 1000, "after": after, "counts": [10] * 1000}
        html = page(tmp_path, a_report(per_class={"target": given}))
        assert "Of 1,000 target classes, the 20 that changed most are shown." in html
        assert len(set(re.findall(r"class-\d+", html))) == 20
        assert "class-7<" in html

    def test_a_class_without_examples_is_left_out(self, tmp_path):
        given = {
            "labels": ["a-one", "b-two"],
            "before": [0.5, math.nan],
            "after": [0.6, math.nan],
            "counts": [3, 0],
        }
        html = page(tmp_path, a_report(per_class={"target": given}))
        assert "a-one" in html
        assert "b-two" not in html

    def test_frozen_and_fresh_layers_are_marked_in_layer_order(self):
        svg = drift_by_layer(a_report()).svg
        assert svg.index(">conv1<") < svg.index(">conv2<") < svg.index(">head<")
        assert ">frozen<" in svg
        assert ">fresh<" in svg

    def test_it_is_the_same_each_time(self, tmp_path):
        assert page(tmp_path, a_report(), a_history()) == page(tmp_path, a_report(), a_history())

    def test_inputs_and_matplotlib_are_left_as_found(self, tmp_path):
        import matplotlib as mpl

        report, history = a_report(), a_history()
        given, settings = copy.deepcopy((report, history)), dict(mpl.rcParams)
        page(tmp_path, report, history)
        assert (report, history) == given
        assert dict(mpl.rcParams) == settings

    @pytest.mark.parametrize("missing", ["matplotlib", "jinja2"])
    def test_the_extra_is_named_where_it_is_missing(self, tmp_path, monkeypatch, missing):
        real = extras.importlib.import_module

        def imported(name, *args):
            if name.partition(".")[0] == missing:
                raise ModuleNotFoundError(f"No module named {name!r}")
            return real(name, *args)

        monkeypatch.setattr(extras.importlib, "import_module", imported)
        with pytest.raises(MissingExtraError, match=re.escape("conservtl[report]")):
            write_html(a_report(), a_history(), tmp_path / "report.html")
        assert list(tmp_path.iterdir()) == []


def a_path(kept=0.7):
    """Target and source from t = 0 to t = 1, with the kept weights marked."""
    return [
        {
            "t": t,
            "target": {"accuracy": 0.5 + 0.4 * t, "loss": 1 - t},
            "source": {"accuracy": 0.99 - 0.1 * t},
            "kept": t == kept,
        }
        for t in (number / 10 for number in range(11))
    ]


class TestPath:
    def test_it_is_drawn_with_what_was_kept(self):
        report = a_report(path=a_path(), path_examples={"source": 150, "target": 2000})
        picture = weight_path(report)
        assert "target 90.0 %" in picture.svg
        assert "source 89.0 %" in picture.svg
        assert "on 2,000 target and 150 source test examples" in picture.caption
        assert "the weights that were kept, t\u00a0=\u00a00.7." in picture.caption

    def test_what_was_kept_is_ringed_on_both_lines(self):
        """Two marks more than without."""
        marks = [weight_path(a_report(path=a_path(kept))).svg.count("<use") for kept in (0.7, None)]
        assert marks[0] == marks[1] + 2

    def test_new_parameters_are_said_to_be_as_trained(self):
        """The plan of this report has a fresh head."""
        assert "New parameters keep their trained values" in weight_path(a_report(path=a_path())).caption
        assert "New parameters" not in weight_path(a_report(path=a_path(), plan=None)).caption

    def test_factors_of_low_rank_are_no_new_parameters(self):
        """They go back with the weights that they change."""
        model, source = (nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)) for _ in range(2))
        plan = ctl.adapt(model, source, [ctl.LoRA(rank=1)]).plan.model_dump(mode="json")
        assert "New parameters" not in weight_path(a_report(path=a_path(), plan=plan)).caption

    def test_the_curves_say_that_the_weights_were_taken_back(self, tmp_path):
        """They end at the trained weights, the table does not."""
        assert "moved back to t\u00a0=\u00a00.7" in page(tmp_path, a_report(path=a_path()), a_history())
        assert "moved back" not in page(tmp_path, a_report(path=a_path(1.0)), a_history())

    def test_it_stands_on_the_page_and_is_left_out_where_it_was_not_measured(self, tmp_path):
        assert page(tmp_path, a_report(path=a_path()), a_history()).count("<svg") == 4
        for path in (None, [], a_path()[:1], [{"t": 0.0}, {"t": 1.0, "target": None}]):
            assert page(tmp_path, a_report(path=path), a_history()).count("<svg") == 3

    def test_without_a_source(self):
        path = [{key: value for key, value in entry.items() if key != "source"} for entry in a_path()]
        svg = weight_path(a_report(path=path, path_examples={"target": 9})).svg
        assert "source" not in re.sub(r"<title>.*?</title>", "", svg)


class TestJson:
    def test_what_is_written_can_be_read(self, tmp_path):
        path = tmp_path / "folder" / "report.json"
        write_json(a_report(), path)
        assert json.loads(path.read_text(encoding="utf-8")) == a_report()
        assert [file.name for file in path.parent.iterdir()] == ["report.json"]

    def test_keys_are_sorted_but_layers_and_fields_keep_their_order(self, tmp_path):
        path = tmp_path / "report.json"
        write_json({"b": {"z": 1, "y": 2}, "a": 1, "drift": {"in": 0.1, "head": 0.2}}, path)
        written = json.loads(path.read_text(encoding="utf-8"))
        assert list(written) == ["a", "b", "drift"]
        assert list(written["b"]) == ["y", "z"]
        assert list(written["drift"]) == ["in", "head"]

    def test_what_json_does_not_have(self, tmp_path):
        """NaN becomes null; scalars, paths and tuples become plain values."""
        import torch

        class Kind(StrEnum):
            A = "a"

        path = tmp_path / "report.json"
        value = {
            "nan": math.nan,
            "inf": [math.inf],
            "t": torch.tensor(2.5),
            "p": Path("x"),
            "s": (1, 2),
            "k": Kind.A,
        }
        write_json(value, path)
        assert json.loads(path.read_text(encoding="utf-8")) == {
            "nan": None,
            "inf": [None],
            "t": 2.5,
            "p": "x",
            "s": [1, 2],
            "k": "a",
        }

    def test_a_value_it_cannot_write_is_named_and_the_old_file_stays(self, tmp_path):
        path = tmp_path / "report.json"
        write_json({"old": 1}, path)
        with pytest.raises(TypeError, match=re.escape("report.a.b[1]: ")):
            write_json({"a": {"b": [1, object()]}}, path)
        assert json.loads(path.read_text(encoding="utf-8")) == {"old": 1}

    def test_a_crash_while_writing_leaves_the_old_file(self, tmp_path, monkeypatch):
        path = tmp_path / "report.json"
        write_json({"old": 1}, path)

        def crash(descriptor):
            raise OSError("no space left on device")

        monkeypatch.setattr(os, "fsync", crash)
        with pytest.raises(OSError, match="no space"):
            write_json({"new": 2}, path)
        assert json.loads(path.read_text(encoding="utf-8")) == {"old": 1}
        assert [file.name for file in tmp_path.iterdir()] == ["report.json"]


def test_the_page_says_what_is_decided_beside_the_layers(speech_fields, tmp_path):
    """Terms, updates of norms and endings: a table of rates would show half of a recipe only."""
    kept = [
        {"kind": "wise_ft"},
        {"kind": "delta"},
        {"kind": "norm_adaptation", "train": "all", "statistics": "instance"},
    ]
    run(parse_spec({**speech_fields, "strategies": kept, "training": {"epochs": 1}}), tmp_path)
    page = html.unescape((tmp_path / "report.html").read_text(encoding="utf-8"))
    for by in ("NormAdaptation: statistics", "FeatureConservation: ", "WeightInterpolation: weights at 0.7"):
        assert by in page
