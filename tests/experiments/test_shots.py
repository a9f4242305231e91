"""All examples, or up to a most: a class with few of them refuses no run, and every result says how many were taken."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

import conservtl as ctl
from conservtl.data import draw_shots
from conservtl.data.shots import UpTo, may_validate, number_of_shots
from conservtl.experiments.run.runner import plan_of, run
from conservtl.experiments.run.setting import prepare
from conservtl.experiments.run.source_labels import data_line, none_held_out
from conservtl.experiments.spec.spec import dump_spec, load_spec, parse_spec, with_fields
from conservtl.experiments.studies.comparison import compare
from conservtl.experiments.studies.layer_sweep import sweep
from conservtl.experiments.studies.tuning import tune
from conservtl.experiments.studies.variants import early_stopping
from conservtl.report import write_compare, write_sweep

NONE = "nothing of it was held out"
LABELS = [0] * 8 + [1] * 2 + [2]


@pytest.fixture(scope="module")
def uneven(humming, tmp_path_factory):
    """Of the target's words, 0 has eight recordings, 1 two and 2 one."""
    root = tmp_path_factory.mktemp("uneven")
    kept = {"0": 8, "1": 2, "2": 1}
    for file in humming.iterdir():
        word, speaker, take = file.stem.split("_")
        if speaker != "cleo" or int(take) < kept[word]:
            shutil.copy(file, root / file.name)
    return root


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A folder in which the tests share their source model."""
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def fields(speech_fields, uneven, cache):
    return {
        **speech_fields,
        "data": {**speech_fields["data"], "root": str(uneven), "shots": {"up_to": 3}},
        "source": {**speech_fields["source"], "cache": cache},
        "training": {"epochs": 1},
    }


@pytest.fixture
def images(tmp_path):
    """Three classes: five training images of a, two of b and one of c, two test images of each."""
    pil = pytest.importorskip("PIL.Image")
    pytest.importorskip("torchvision")
    for part, counts in (("train", {"a": 5, "b": 2, "c": 1}), ("test", {"a": 2, "b": 2, "c": 2})):
        for seed, (label, count) in enumerate(counts.items()):
            folder = tmp_path / "images" / part / label
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = np.random.default_rng(10 * seed + number).integers(0, 255, (8, 8, 3), dtype=np.uint8)
                pil.fromarray(pixels).save(folder / f"{number}.png")
    return tmp_path / "images"


class TestDraws:
    @pytest.mark.parametrize(("shots", "expected"), [("all", [7, 1, 1]), (UpTo(up_to=3), [3, 1, 1])])
    def test_one_example_is_left_to_test_on_where_there_are_two(self, shots, expected):
        drawn, rest = draw_shots(LABELS, shots, 0)
        assert Counter(LABELS[i] for i in drawn) == dict(enumerate(expected))
        assert sorted(drawn + rest) == list(range(11))

    def test_up_to_a_number_that_all_have_is_that_number(self):
        labels = [0] * 5 + [1] * 4
        assert draw_shots(labels, UpTo(up_to=3), 7) == draw_shots(labels, 3, 7)

    def test_a_number_is_a_number_of_each(self):
        with pytest.raises(ctl.DataError, match=r"label 1 has 2 examples; 3 .* at most 1, or \{up_to: 3\}"):
            draw_shots(LABELS, 3, 0)

    @pytest.mark.parametrize("shots", ["all", UpTo(up_to=2)])
    def test_something_is_left_to_test_on(self, shots):
        with pytest.raises(ctl.DataError, match="every label has one example, so none is left to test on"):
            draw_shots([0, 1, 2], shots, 0)

    def test_counts(self):
        found = [number_of_shots(shots, 4, spare=1) for shots in (2, "all", UpTo(up_to=9), UpTo(up_to=1))]
        assert found == [2, 3, 3, 1]
        assert [may_validate(shots) for shots in (1, UpTo(up_to=1))] == [False, False]
        assert [may_validate(shots) for shots in (2, UpTo(up_to=2), "all")] == [True, True, True]


class TestSpecs:
    @pytest.mark.parametrize(("text", "shots"), [("all", "all"), ("{up_to: 4}", UpTo(up_to=4)), ("3", 3)])
    def test_files_overrides_and_resolved_specs(self, tmp_path, text, shots):
        path = tmp_path / "spec.yaml"
        data = "data: {kind: folder, root: x, target: theo, shots: "
        path.write_text(f"task: speech\n{data}{text}}}\n")
        spec = load_spec(path)
        path.write_text("task: speech\n" + data + "5}\n")
        assert load_spec(path, [f"data.shots={text}"]) == spec
        assert spec.data.shots == shots
        path.write_text(dump_spec(spec))
        assert load_spec(path) == spec

    @pytest.mark.parametrize("shots", [0, -1, "some", {"up_to": 0}, {"most": 3}, [3], None, 1.5, True])
    def test_others_are_refused_in_one_line(self, shots):
        data = {"kind": "folder", "root": "x", "target": "theo", "shots": shots}
        with pytest.raises(ctl.SpecError) as error:
            parse_spec({"task": "speech", "data": data})
        rule = "data.shots: Input should be a whole number greater than or equal to 1, 'all', or {up_to: a number}"
        assert str(error.value).count(rule) == 1
        assert str(error.value).count("\n") == 1

    def test_early_stopping_needs_a_second_example(self, fields):
        spec = parse_spec(fields)
        assert early_stopping(spec)["data.validation"] == 0.2
        assert not early_stopping(with_fields(spec, {"data.shots": {"up_to": 1}}))

    def test_a_task_that_counts_its_shots_itself_takes_numbers_only(self):
        from conservtl.tasks.base import DataSection

        with pytest.raises(ValueError, match="integer"):
            DataSection(shots="all")


class TestSpeech:
    def test_taken(self, fields):
        setting = prepare(parse_spec(fields))
        assert setting.taken == {"0": 3, "1": 1, "2": 1}
        assert len(setting.domains.shots) == 5
        assert len(setting.domains.target_test) == 6
        assert prepare(with_fields(setting.spec, {"data.shots": "all"})).taken == {"0": 7, "1": 1, "2": 1}

    def test_shots_to_validate_on_count(self, fields):
        setting = prepare(with_fields(parse_spec(fields), {"data.shots": "all", "data.validation": 0.4}))
        assert setting.taken == {"0": 7, "1": 1, "2": 1}
        assert len(setting.domains.validation) == 3

    def test_a_number_still_refuses_and_says_how_not_to(self, fields):
        with pytest.raises(ctl.DataError, match=r"'cleo' has 2 recordings of '1'; 3 .*at most 1 or to \{up_to: 3\}"):
            prepare(with_fields(parse_spec(fields), {"data.shots": 3}))

    def test_plan_and_report(self, fields, tmp_path):
        spec = parse_spec(fields)
        note = "data  1 to 3 recordings of each class are taken, 5 in all; fewer than 3 of '1', '2'"
        assert note in str(plan_of(spec))
        assert "data  3 classes, '0', '1', '2': 5 recordings (1 to 3 a class) to adapt with, " in str(plan_of(spec))
        report = run(spec, tmp_path / "out")
        assert report["taken"] == {"0": 3, "1": 1, "2": 1}
        assert "cleo from up to 3 recordings a class (1 to 3)" in report["sentence"]
        assert json.loads((tmp_path / "out" / "report.json").read_text())["shots"] == {"up_to": 3}
        assert "up to 3 recordings a class (1 to 3)" in (tmp_path / "out" / "report.html").read_text()

    def test_recommend(self, fields):
        pytest.importorskip("sklearn")
        found = ctl.recommend(with_fields(parse_spec(fields), {"data.shots": "all"}), range_test=False)
        assert "(1 to 7 examples a class" in str(found)
        assert found.spec.data.shots == "all"

    def test_compare(self, fields, tmp_path):
        section = {"seeds": 1, "targets": ["cleo"], "baselines": ["source as it is"], "shots": ["all", 1, {"up_to": 3}]}
        spec = parse_spec({**fields, "compare": section, "data": {**fields["data"], "words": ["0", "1"]}})
        result = compare(spec, tmp_path / "out")
        assert [table["shots"] for table in result["tables"]] == [1, {"up_to": 3}, "all"]
        taken = [table["taken"] for table in result["tables"]]
        assert taken[1:] == [{"fewest": 1, "most": 3, "mean": 2.0}, {"fewest": 1, "most": 7, "mean": 4.0}]
        assert "At up to 3 shots a class (1 to 3) " in result["verdict"][1]
        assert "At all shots a class (1 to 7) " in result["verdict"][2]
        write_compare(result, tmp_path / "page.html")
        page = (tmp_path / "page.html").read_text()
        assert "In numbers, up to 3 shots a class (1 to 3)" in page
        assert "What each further example brings" in page

    def test_sweep(self, fields, tmp_path):
        section = {
            "seeds": 1,
            "targets": ["cleo"],
            "layers": [0],
            "sides": ["input"],
            "controls": False,
            "strengths": [1],
        }
        result = sweep(parse_spec({**fields, "sweep": section}), tmp_path / "out")
        assert (result["shots"], result["taken"]["fewest"], result["taken"]["most"]) == ({"up_to": 3}, 1, 3)
        write_sweep(result, tmp_path / "page.html")
        assert "Every run adapts to up to 3 shots a class (1 to 3)." in (tmp_path / "page.html").read_text()

    def test_tune_needs_a_second_example(self, fields, tmp_path):
        pytest.importorskip("optuna")
        fields["data"] |= {"shots": {"up_to": 1}, "validation": 0.4}
        fields["training"] = {"lr": {"range": [1e-4, 1e-3]}}
        with pytest.raises(ctl.SpecError, match=r"data\.shots \{'up_to': 1\}\. Set .* at least 2 shots"):
            tune(fields, tmp_path / "out")


class TestVision:
    @pytest.fixture
    def spec(self, images):
        data = {"kind": "imagefolder", "root": str(images), "images": {"size": 16}, "augment": False}
        source = {"data": None, "weights": "w.pt"}
        return lambda shots: parse_spec({"task": "vision", "data": {**data, "shots": shots}, "source": source})

    def test_a_test_part_of_its_own_leaves_all_to_adapt_with(self, spec):
        setting = prepare(spec("all"))
        assert setting.taken == {"a": 5, "b": 2, "c": 1}
        assert len(setting.domains.target_test) == 6
        assert setting.domains.notes == ("1 to 5 images of each class are taken, 8 in all",)

    def test_up_to(self, spec):
        setting = prepare(spec({"up_to": 2}))
        assert setting.taken == {"a": 2, "b": 2, "c": 1}
        assert setting.domains.notes == ("1 to 2 images of each class are taken, 5 in all; fewer than 2 of 'c'",)

    def test_a_line_names_classes_and_counts_examples(self, spec):
        setting = prepare(spec("all"))
        line = "3 classes, 'a', 'b', 'c': 8 images (1 to 5 a class) to adapt with, 6 images (2 a class) to test on"
        assert data_line(setting.task, setting.domains, setting.spec.data) == line
        trained = replace(setting.domains, source_train=setting.domains.shots, source_labels=("a", "b", "c"))
        assert data_line(setting.task, trained, setting.spec.data) == f"{line}, none of the source: {NONE}"
        tested = replace(trained, source_test=setting.domains.shots)
        assert data_line(setting.task, tested, setting.spec.data) == f"{line}, 8 images (1 to 5 a class) of the source"
        assert none_held_out(SimpleNamespace(held_out=0.1)) == f"{NONE} (data.held_out)"

    def test_a_plan_needs_a_source_as_a_run_does(self, spec):
        bare = with_fields(spec(1), {"source": {}})
        with pytest.raises(ctl.SpecError, match=r"names no source .* source\.weights or data\.source_root or data\.c"):
            plan_of(bare)

    def test_a_number(self, spec):
        with pytest.raises(ctl.DataError, match=r"class 'b' has 2.* at most 2, or to \{up_to: 3\}"):
            prepare(spec(3))
        setting = prepare(spec(1))
        assert setting.taken == dict.fromkeys("abc", 1)
        assert not setting.domains.notes

    def test_digits_without_a_test_part(self):
        pytest.importorskip("sklearn")
        setting = prepare(parse_spec({"task": "vision", "data": {"kind": "digits", "shots": "all"}}))
        assert len(setting.domains.target_test) == 5
        assert min(setting.taken.values()) > 150
