"""The command line: output and exit codes."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
import yaml

from conservtl import cli
from conservtl.cli import _main
from conservtl.cli._studies import _print_estimate
from conservtl.engine.checkpoint import Checkpoints
from conservtl.experiments.run.setting import Setting

ROOT = Path(__file__).parents[1]


@pytest.fixture
def spec(speech_fields, tmp_path):
    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump(speech_fields))
    return path


def call(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["conservtl", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        cli.main()
    found = capsys.readouterr()
    return left.value.code, found.out, found.err


def test_plan_prints_the_table_and_json(spec, monkeypatch, capsys):
    code, out, _ = call(monkeypatch, capsys, "plan", spec, "--set", "strategies=[{kind: l2_sp}]")
    assert code == 0
    assert "head" in out
    assert "(100.0 %), 0 frozen" in out
    code, out, _ = call(monkeypatch, capsys, "plan", spec, "--json")
    assert json.loads(out)["rows"][0]["depth"] == 0


def test_run_says_its_data_as_plan_does_before_anything_is_trained(spec, tmp_path, monkeypatch, capsys):
    def data(out: str) -> list[str]:
        return [line for line in out.splitlines() if line.startswith("data  ")]

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    _, plan, _ = call(monkeypatch, capsys, "plan", spec)
    with monkeypatch.context() as stopped:
        stopped.setattr(Setting, "fit", interrupted)
        code, cut, _ = call(stopped, capsys, "run", spec, "--out", tmp_path / "out")
    assert code == 130
    assert data(cut) == data(plan) != []
    code, whole, _ = call(monkeypatch, capsys, "run", spec, "--out", tmp_path / "out")
    assert code == 0
    assert data(whole) == data(plan)
    assert whole.startswith("data  3 classes, '0', '1', '2': ")


def test_run_then_predict(spec, humming, tmp_path, monkeypatch, capsys):
    code, out, _ = call(monkeypatch, capsys, "run", spec, "--out", tmp_path / "out")
    assert code == 0
    assert "target accuracy" in out
    assert "report.html" in out
    recording = humming / "1_cleo_5.wav"
    code, out, _ = call(monkeypatch, capsys, "predict", tmp_path / "out", recording)
    file, label, probability = out.strip().split("\t")
    assert (code, file) == (0, str(recording))
    assert label in "012"
    assert 1 / 3 <= float(probability) <= 1
    files = [humming / f"{word}_anna_{take}.wav" for word in "012" for take in range(2)]
    sizes = [
        call(monkeypatch, capsys, "predict", tmp_path / "out", *files, *more) for more in ((), ("--batch-size", 4))
    ]
    assert len(sizes[0][1].splitlines()) == 6
    assert [line.split("\t")[:2] for line in sizes[1][1].splitlines()] == [
        line.split("\t")[:2] for line in sizes[0][1].splitlines()
    ]
    code, _, err = call(monkeypatch, capsys, "predict", tmp_path / "out", recording, "--batch-size", 0)
    assert code == 2
    assert "--batch-size" in err


def test_of_several_processes_the_first_writes_and_prints(spec, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    own = ("--set", f"source.cache={tmp_path / 'cache'}")
    code, out, _ = call(monkeypatch, capsys, "run", spec, "--out", tmp_path / "out", *own)
    assert (code, out) == (0, "")
    assert not [
        name for name in ("report.json", "model.safetensors", "spec.yaml") if (tmp_path / "out" / name).exists()
    ]
    assert not list((tmp_path / "cache").glob("*.safetensors"))


def test_recommend_writes_a_spec_that_runs(spec, tmp_path, monkeypatch, capsys):
    code, out, _ = call(monkeypatch, capsys, "recommend", spec, "--write", tmp_path / "better.yaml")
    assert code == 0
    assert "strategies:" in out
    code, _, _ = call(monkeypatch, capsys, "plan", tmp_path / "better.yaml")
    assert code == 0


def test_lr_find_draws_its_picture_and_refuses_another_kind(spec, tmp_path, monkeypatch, capsys):
    code, out, _ = call(monkeypatch, capsys, "lr-find", spec, "--out", tmp_path / "range.html")
    assert code == 0
    assert "is suggested" in out
    assert (tmp_path / "range.html").is_file()
    code, _, err = call(monkeypatch, capsys, "lr-find", spec, "--out", tmp_path / "range.bmp")
    assert code == 2
    assert ".html or .png" in err


def test_schema_is_json(monkeypatch, capsys):
    code, out, _ = call(monkeypatch, capsys, "schema")
    assert code == 0
    assert "L2SP" in json.loads(out)["$defs"]


OWN_STRATEGY = """
from typing import Literal
import conservtl as ctl

class HoldBiases(ctl.Strategy):
    kind: Literal["hold_biases"] = "hold_biases"

    def apply(self, plan):
        biases = [row.name for row in plan.rows if row.kind == "bias"]
        return plan.choose(self.label, "frozen", {name: {"frozen": True} for name in biases})
"""


@pytest.fixture
def own_strategy(tmp_path, monkeypatch):
    """A module in the working directory that registers a strategy, unregistered after the test."""
    from conservtl import Strategy, plugins

    (tmp_path / "own_strategy.py").write_text(OWN_STRATEGY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plugins, "_IMPORTED", {})
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    Strategy.named.pop("hold_biases", None)
    sys.modules.pop("own_strategy", None)


@pytest.mark.usefixtures("own_strategy")
def test_a_strategy_of_ones_own_is_imported_by_name(spec, monkeypatch, capsys):
    """A spec imports nothing by itself; the error says how."""
    named = ["--set", "strategies=[{kind: hold_biases}]"]
    code, _, err = call(monkeypatch, capsys, "plan", spec, *named)
    assert code == 2
    assert "'hold_biases' is none of auto_rgn" in err
    assert "`--import package.module`" in err
    code, out, _ = call(monkeypatch, capsys, "plan", spec, *named, "--import", "own_strategy")
    assert code == 0
    assert " 3 frozen" in out
    code, out, _ = call(monkeypatch, capsys, "schema", "--import", "own_strategy")
    assert "HoldBiases" in json.loads(out)["$defs"]


@pytest.mark.usefixtures("own_strategy")
def test_processes_import_what_the_command_line_imports(spec, tmp_path, monkeypatch, capsys):
    asked = ["--set", "compare={targets: [cleo], seeds: 2, baselines: []}", "--set", "strategies=[{kind: hold_biases}]"]
    words = [*asked, "--import", "own_strategy", "--processes", 2, "--out", tmp_path / "compare"]
    code, _, err = call(monkeypatch, capsys, "compare", spec, *words)
    assert code == 0, err


@pytest.mark.usefixtures("own_strategy")
@pytest.mark.parametrize("verb", ["plan", "run", "compare", "sweep", "tune", "recommend", "lr-find", "schema"])
def test_every_verb_that_reads_a_spec_imports(verb, spec, monkeypatch, capsys):
    words = [] if verb == "schema" else [spec]
    code, _, err = call(monkeypatch, capsys, verb, *words, "--import", "no_such_module")
    assert code == 2
    assert "--import 'no_such_module': the module cannot be imported" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "data.shotz=3"], "did you mean 'shots'"),
        (["--set", "training.epochs=0"], "training.epochs"),
        (["--set", "data.shots=100000"], "shots"),
        (["--set", "source.weights=nowhere.pt"], "nowhere.pt"),
        (["--set", "model.name=tc_resnot8"], "tc_resnot8"),
        (["--resume"], "checkpoint"),
    ],
)
def test_bad_input_exits_with_2_and_names_the_field(spec, tmp_path, monkeypatch, capsys, arguments, message):
    code, _, err = call(monkeypatch, capsys, "run", spec, "--out", tmp_path / "out", *arguments)
    assert code == 2
    assert message.lower() in err.lower()
    assert "Traceback" not in err


@pytest.mark.parametrize("arguments", [["run"], ["predict"], ["nonsense"], ["run", "nowhere.yaml"]])
def test_a_wrong_command_line_exits_with_2(monkeypatch, capsys, arguments):
    assert call(monkeypatch, capsys, *arguments)[0] == 2


def test_an_unforeseen_failure_is_not_bad_input(spec, tmp_path, monkeypatch, capsys):
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("conservtl.experiments.run.runner.run", fail)
    monkeypatch.setattr(sys, "argv", ["conservtl", "run", str(spec), "--out", str(tmp_path / "out")])
    with pytest.raises(ZeroDivisionError):  # Python itself then exits with 1
        cli.main()


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_interrupted_exits_with_130_and_resume_ends_where_an_uninterrupted_run_does(
    spec, tmp_path, monkeypatch, capsys
):
    """The process sends itself SIGINT at the end of an epoch, so that a busy machine changes nothing."""
    write_history, stop = Checkpoints.write_history, None

    def interrupted(self, history):
        write_history(self, history)
        if len(history) == stop:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Checkpoints, "write_history", interrupted)

    def run(out, *more):
        return call(monkeypatch, capsys, "run", spec, "--set", "training.epochs=10", "--out", tmp_path / out, *more)

    assert run("whole")[0] == 0
    whole = (tmp_path / "whole" / "model.safetensors").read_bytes()
    for epoch in (1, 7):
        stop = epoch
        code, _, err = run(f"cut_{epoch}")
        assert code == 130, err
        assert "--resume" in err
        assert "Traceback" not in err
        assert len((tmp_path / f"cut_{epoch}" / "history.jsonl").read_text().splitlines()) == epoch
        assert not (tmp_path / f"cut_{epoch}" / "model.safetensors").exists()
        stop = None
        assert run(f"cut_{epoch}", "--resume")[0] == 0
        assert (tmp_path / f"cut_{epoch}" / "model.safetensors").read_bytes() == whole


@pytest.mark.parametrize(
    ("runs", "seconds", "sources", "text"),
    [
        (1, 61.0, 1, "1 run, about 1 minute on this machine, and the training of up to 1 source model, which is kept"),
        (2, 120.0, 2, "2 runs, about 2 minutes on this machine, and the training of up to 2 source models, which are"),
        (2, 3.0, 0, "2 runs, less than a minute on this machine, and the training of up to 0 source models, which are"),
    ],
)
def test_an_estimate_counts_in_words(capsys, runs, seconds, sources, text):
    _print_estimate({"runs": runs, "seconds": seconds, "sources": sources})
    assert capsys.readouterr().out.startswith(text)


def test_many_runs_from_the_command_line(spec, tmp_path, monkeypatch, capsys):
    """Each writes its results and its page; --dry-run prints an estimate instead."""
    only = "targets: [cleo], seeds: 1"
    asked = ["--set", f"compare={{{only}, baselines: [source as it is]}}", "--out", tmp_path / "compare"]
    code, out, _ = call(monkeypatch, capsys, "compare", spec, *asked, "--dry-run")
    assert (code, out[:7]) == (0, "2 runs,")
    assert not (tmp_path / "compare").exists()
    rate = "training.lr={choices: [1.0e-3]}"
    for name, section, more, runs in (
        ("sweep", f"{only}, layers: [0], strengths: [1.0]", "seed=0", "10 runs,"),
        ("tune", "trials: 3", rate, "3 runs,"),
    ):
        words = ["--set", f"{name}={{{section}}}", "--set", "data.validation=0.5", "--set", more, "--dry-run"]
        code, out, _ = call(monkeypatch, capsys, name, spec, *words, "--out", tmp_path / name)
        assert (code, out[: len(runs)]) == (0, runs)
        assert not (tmp_path / name).exists()
    code, out, _ = call(monkeypatch, capsys, "compare", spec, *asked)
    assert code == 0
    assert "too few to tell" in out.splitlines()[0]
    assert out.index("too few to tell") < out.index("source as it is ") < out.index("report.html")
    asked = ["--set", f"sweep={{{only}, layers: [0], strengths: [1.0]}}", "--out", tmp_path / "sweep"]
    code, out, _ = call(monkeypatch, capsys, "sweep", spec, *asked)
    assert code == 0
    assert out.startswith("Of the strengths of l2_sp, 1 has the best harmonic mean, ")
    assert out.index("Strengths of l2_sp") < out.rindex("One run each.") < out.index("report.html")
    asked = ["--set", "training.lr={choices: [1.0e-3]}", "--set", "data.validation=0.5", "--set", "tune={trials: 1}"]
    code, out, _ = call(monkeypatch, capsys, "tune", spec, *asked, "--out", tmp_path / "tune")
    assert code == 0
    assert out.startswith("Of 1 trial, number 0 is the best: harmonic mean ")
    assert "best: trial 0: training.lr = 0.001\n" in out
    assert "judged on 3 validation examples: one changes it by 33.3 points." in out  # half of two shots of three words
    assert out.splitlines()[-2:] == [str(tmp_path / "tune" / name) for name in ("best.yaml", "report.html")]
    for name in ("compare", "sweep", "tune"):
        assert json.loads((tmp_path / name / f"{name}.json").read_text())["kind"] == name
        assert "<svg" in (tmp_path / name / "report.html").read_text()


def test_merge_writes_a_file_or_says_one_line(tmp_path, monkeypatch, capsys):
    from safetensors.torch import load_file, save_file

    for name, value in (("source", 0.0), ("one", 1.0), ("two", 3.0)):
        save_file({"w": torch.full((2, 2), value)}, tmp_path / f"{name}.safetensors")
    files = [tmp_path / f"{name}.safetensors" for name in ("source", "one", "two")]
    code, out, _ = call(monkeypatch, capsys, "merge", *files, "--t", "0.5", "--out", tmp_path / "out")
    assert (code, out) == (0, f"{tmp_path / 'out'}: 1 tensor mixed\n")
    assert load_file(tmp_path / "out/model.safetensors")["w"].tolist() == [[1.0, 1.0], [1.0, 1.0]]
    code, _, err = call(monkeypatch, capsys, "merge", *files, "--out", tmp_path / "more")
    assert code == 2
    assert err.startswith("conservtl: t must say how far interpolate goes")


def test_many_processes_share_a_run_alone(spec, monkeypatch, capsys):
    monkeypatch.setattr(_main, "_WORLD", 2)
    code, _, err = call(monkeypatch, capsys, "plan", spec)
    assert code == 2
    assert "many processes share the command run; received 'plan'" in err
