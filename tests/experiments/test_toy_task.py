"""A task of a user's own, in one folder: run, reported, loaded, predicted with and compared as the built-in ones."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

import conservtl as ctl
from conservtl import plugins
from conservtl.experiments.advice.lr_range_test import lr_find_for
from conservtl.experiments.run.runner import plan_of, run
from conservtl.experiments.run.setting import prepare
from conservtl.experiments.spec.spec import dump_spec, load_spec, schema, with_fields
from conservtl.experiments.studies.comparison import compare
from conservtl.report import write_compare
from conservtl.tasks.base import Task, task_classes
from conservtl.tasks.registry import task_named

FOLDER = Path(__file__).parents[2] / "examples" / "extend" / "toy_task"


@pytest.fixture(scope="module", autouse=True)
def imported():
    """The example as ``--import`` finds it; forgotten afterwards."""
    before, path = dict(plugins._IMPORTED), list(sys.path)
    plugins.import_modules([str(FOLDER)])
    yield
    from conservtl.tasks import base

    base._CLASSES.pop("pitch")
    plugins._IMPORTED.clear()
    plugins._IMPORTED.update(before)
    sys.path[:] = path
    for name in [name for name in sys.modules if name.partition(".")[0] == "toy_task"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    quick = ["source.training.epochs=15", "training.epochs=10", "data.source_hums=256", f"source.cache={cache}"]
    return load_spec(FOLDER / "spec.yaml", quick)


@pytest.fixture(scope="module")
def done(spec, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    return run(spec, out), out


def test_it_is_known_by_name_and_described_in_the_schema():
    assert type(task_named("pitch")).__name__ == "Pitch"
    found = json.loads(schema())
    assert "pitch" in found["discriminator"]["mapping"]
    fields = found["$defs"]["PitchData"]["properties"]
    assert fields["target"]["description"] == "The sensor to adapt to."


def test_a_wrong_field_of_it_is_named_as_any_other(spec):
    with pytest.raises(ctl.SpecError, match=r"data\.noyse: there is no such field\. Did you mean 'noise'"):
        with_fields(spec, {"data.noyse": 1})
    with pytest.raises(ctl.SpecError, match=r"data\.target: .*'slow clock'.*received 'fast clock'"):
        with_fields(spec, {"data.target": "fast clock"})


def test_a_task_that_is_not_imported_is_missed_with_the_fix(spec):
    with pytest.raises(ctl.SpecError, match=r"'pich' is none of .*Did you mean 'pitch'.*--import"):
        task_named("pich")
    with pytest.raises(ctl.SpecError, match=r"'pich' is none of .*--import MODULE"):
        with_fields(spec, {"task": "pich"})


def test_its_plan_is_drawn(spec):
    assert plan_of(spec).layers[-1] == "7"


def test_a_run_reports_its_own_metric_in_its_own_direction(done, spec):
    report, out = done
    assert report["metric"] == {
        "key": "mae",
        "name": "mean absolute error (octaves)",
        "better": "lower",
        "share": False,
    }
    assert report["after"]["target"]["mae"] < report["before"]["target"]["mae"]
    assert report["agreement"] is report["per_class"]["target"] is None
    assert "mean absolute error (octaves)" in report["sentence"]
    assert "made the target worse" not in report["sentence"]
    assert "a class" not in report["sentence"]
    page = (out / "report.html").read_text()
    assert "mean absolute error (octaves)" in page
    assert load_spec(out / "spec.yaml") == spec
    assert "task: pitch" in dump_spec(spec)


def test_the_numbers_are_those_of_the_saved_model(done, spec):
    report, out = done
    test = prepare(spec).domains.target_test
    outputs = ctl.load_adapted(out).outputs(test.inputs)
    assert report["after"]["target"]["mae"] == pytest.approx((outputs - test.labels).abs().mean().item(), rel=1e-4)


def test_it_predicts_files(done, spec, tmp_path):
    _, out = done
    test = prepare(spec).domains.target_test
    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for file, wave in zip(files, test.inputs, strict=False):
        file.write_text("\n".join(str(value) for value in wave.tolist()))
    adapted = ctl.load_adapted(out)
    expected = adapted.outputs(test.inputs[:2])[:, 0].tolist()
    found = adapted.predict(files)
    assert [float(one.label) for one in found] == pytest.approx(expected, abs=2e-3)
    assert str(found[0]) == f"{files[0]}\t{found[0].label}"
    files[0].write_text("1\n2")
    with pytest.raises(ctl.DataError, match="must hold 128 samples; it holds 2"):
        adapted.predict(files[0])


def test_it_selects_by_its_metric(spec, tmp_path):
    """The kept weights are those of the epoch with the least error on the validation part."""
    fields = {"data.validation": 0.5, "training.keep": "target", "training.evaluate_every": 1, "training.lr": 0.02}
    run(with_fields(spec, fields), tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out" / "history.jsonl").read_text().splitlines()]
    errors = [line["valid"]["target"]["mae"] for line in lines]
    validation = prepare(with_fields(spec, fields)).domains.validation
    outputs = ctl.load_adapted(tmp_path / "out").outputs(validation.inputs)
    assert (outputs - validation.labels).abs().mean().item() == pytest.approx(min(errors), rel=1e-4)
    assert min(errors) < errors[-1]


def test_a_comparison_over_its_targets_in_processes(spec, tmp_path):
    """Workers import the task; all targets share one source model; the least error is the best."""
    assert spec.problem.targets(spec.data) == ("slow clock", "muffled", "mains hum")
    section = {"seeds": 1, "targets": ["slow clock", "mains hum"], "baselines": ["source as it is", "linear probe"]}
    result = compare(with_fields(spec, {"compare": section}), tmp_path, processes=2)
    (table,) = result["tables"]
    assert [row["id"] for row in table["rows"]] == ["source", "linear_probe", "L2SP"]
    assert list(table["rows"][0]["per_target"]) == ["slow clock", "mains hum"]
    means = {row["variant"]: row["harmonic"]["mean"] for row in table["rows"] if row["baseline"]}
    assert means[table["best_baseline"]] == min(means.values())
    assert len(list(spec.source.cache.glob("pitch-*.safetensors"))) == 1
    write_compare(result, tmp_path / "report.html")
    assert "mean absolute error (octaves)" in (tmp_path / "report.html").read_text()


def test_a_range_test_takes_its_loss(spec):
    assert 1e-6 < lr_find_for(spec, steps=60).suggestion < 1


def test_what_needs_classes_says_so(spec):
    pytest.importorskip("sklearn")
    with pytest.raises(ctl.SpecError, match="need classes, and the task 'pitch' has none"):
        ctl.recommend(spec)


def test_another_task_of_the_same_name_is_refused():
    with pytest.raises(ctl.SpecError, match=r"'pitch' of .*Other is that of toy_task"):
        type("Other", (task_classes()["pitch"],), {"name": "pitch"})
    assert task_classes()["pitch"].__name__ == "Pitch"


def test_sequences_of_any_length_fit_the_protocol():
    """A recognizer as the next task: a dictionary of padded tensors, a pooled error rate, no classes."""

    class Words(Task):
        def load(self, data, model, *, seed, source):
            raise NotImplementedError

        def build(self, model, preprocessing, outputs):
            raise NotImplementedError

        def forward(self, model, batch):
            return model(batch["frames"]), batch["lengths"]

        def loss(self, outputs, batch):
            return outputs[0].mean()

        def metrics(self, outputs, batch):
            return {"wer": (batch["wrong"].sum(), batch["words"].sum())}

        def predictions(self, outputs, labels, files):
            return []

    from conservtl.data import first_batch, join, spread
    from conservtl.experiments.run.scoring import score_model

    data = {
        "frames": torch.randn(300, 7, 3),
        "lengths": torch.arange(300) % 7 + 1,
        "wrong": torch.arange(300) % 2,
        "words": torch.arange(300) % 5 + 1,
    }
    scores = score_model(Words(), torch.nn.Linear(3, 4), data)
    assert scores.metrics["wer"] == pytest.approx(150 / int(data["words"].sum()))
    assert [len(batch[1]) for batch in scores.outputs] == [256, 44]
    assert scores.labels == (None, None)
    assert len(spread(data, 10)["frames"]) == len(first_batch(data, 10)["words"]) == 10
    assert len(join([data, data])) == 600


def test_the_command_line_takes_it_by_import(python, tmp_path):
    """In a process that knows nothing of it: plan, run and predict."""

    def conservtl(*words):
        done = python("-m", "conservtl", *words, "--import", FOLDER)
        assert done.returncode == 0, done.stderr
        return done.stdout

    out = tmp_path / "out"
    quick = ["source.training.epochs=3", "training.epochs=3", "data.source_hums=64", f"source.cache={tmp_path}"]
    overrides = [word for field in quick for word in ("--set", field)]
    assert "2,497 copied from the source" in conservtl("plan", FOLDER / "spec.yaml", *overrides)
    assert "mean absolute error (octaves)" in conservtl("run", FOLDER / "spec.yaml", "--out", out, *overrides)
    file = tmp_path / "hum.txt"
    file.write_text("\n".join(str(number % 9) for number in range(128)))
    name, pitch = conservtl("predict", out, file).split("\t")
    assert name == str(file)
    assert float(pitch) == pytest.approx(float(ctl.load_adapted(out).predict(file)[0].label))
