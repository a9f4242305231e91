"""Studies of one's own problem: results in a folder, resumed by the same call, and workers that compute them."""

import json
import multiprocessing
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import conservtl as ctl
from conservtl.experiments.studies import result_store

FEW = ["source as it is", "fine-tuning, middle rate"]


@pytest.fixture
def study(source, held_out, quick, network, examples):
    def run(**change):
        arguments = {
            "model": network, "source": source, "variants": {"L2-SP": [ctl.L2SP(alpha=0.1)]},
            "train": examples(24, 1.0), "held_out": held_out, "training": quick, "seeds": 2, "baselines": FEW,
        }  # fmt: skip
        return ctl.compare(**(arguments | change))

    return run


@pytest.fixture
def counted(monkeypatch):
    """Labels of the runs that were computed."""
    made = []
    original = result_store.run_trial

    def run(trial):
        made.append(trial.variant)
        return original(trial)

    monkeypatch.setattr(result_store, "run_trial", run)
    return made


def figures(found):
    return [{key: value for key, value in run.items() if key != "seconds"} for run in found.runs]


def test_a_folder_keeps_each_run_and_the_same_call_computes_none_again(study, tmp_path, counted):
    expected = study()
    counted.clear()
    first = study(out=tmp_path)
    assert len(counted) == len(list((tmp_path / "runs").glob("*.json"))) == 6
    assert figures(first) == figures(expected)
    assert json.loads((tmp_path / "compare.json").read_text())["runs"] == first.result["runs"]
    assert figures(study(out=str(tmp_path))) == figures(first)
    assert len(counted) == 6
    more = study(out=tmp_path, seeds=3)
    assert len(counted) == 9  # one seed more: three runs
    assert figures(more)[:6] == figures(first)


def test_an_interrupted_study_goes_on_where_it_stopped(study, tmp_path, monkeypatch, counted):
    once = result_store.run_trial

    def stop(trial):
        if len(counted) == 4:
            raise KeyboardInterrupt
        return once(trial)

    monkeypatch.setattr(result_store, "run_trial", stop)
    with pytest.raises(KeyboardInterrupt):
        study(out=tmp_path)
    monkeypatch.setattr(result_store, "run_trial", once)
    assert len(list((tmp_path / "runs").glob("*.json"))) == 4
    assert figures(study(out=tmp_path)) == figures(study())
    assert counted.count("L2-SP") == 2 + 2  # each once, and the second study without a folder


def changed(examples):
    inputs, labels = examples(24, 1.0)
    inputs[3, 2] += 1e-3
    return inputs, labels


def test_whatever_changes_results_is_another_run(study, tmp_path, counted, network, examples, source, held_out):
    study(out=tmp_path, seeds=1)

    def wider():
        return torch.nn.Sequential(*network(), torch.nn.Identity())

    def twice(model, batch):
        return 2 * model(batch[0])

    def smooth(outputs, batch):
        return torch.nn.functional.cross_entropy(outputs, batch[1], label_smoothing=0.1)

    other = torch.nn.Sequential(*network())
    other.load_state_dict(source.state_dict())
    with torch.no_grad():
        other[0].bias[0] += 1e-4
    changes = [
        {"train": changed(examples)},
        {"held_out": held_out | {"target": (held_out["target"][0].flip(0), held_out["target"][1].flip(0))}},
        {"source": other},
        {"model": wider},
        {"forward": twice},
        {"loss": smooth},
        {"augment": lambda batch, generator: batch},
        {"augment": lambda batch, generator: (batch[0] + 0.1, batch[1])},
        {"optimizer": torch.optim.SGD},
        {"optimizer": torch.optim.Adam},
        {"fresh": ["4"]},
        {"valid": 0.25},
    ]
    for change in changes:
        counted.clear()
        study(out=tmp_path, seeds=1, **change)
        assert counted, change


SCRIPT = """
import sys
import torch
import conservtl as ctl

CLASSES = 3

def network(classes=CLASSES):
    return torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU(), torch.nn.Linear(4, classes))

def main():
    torch.manual_seed(int(sys.argv[2]))  # the process's own state does not matter
    torch.rand(int(sys.argv[2]) + 1)
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(24, 8, generator=generator), torch.arange(24) % 3
    with torch.random.fork_rng():
        torch.manual_seed(0)
        source = network()
    found = ctl.compare(
        lambda: network(CLASSES), source, {"a": [ctl.L2SP()]}, torch.utils.data.TensorDataset(*data),
        {"target": data, "source": data}, ctl.Training(epochs=1, lr=1e-2, device="cpu"), seeds=1,
        baselines=["source as it is"], out=sys.argv[1], progress=True,
        metrics=lambda outputs, batch: {"accuracy": (outputs.argmax(-1) == batch[1]).float().mean()},
        **({"processes": 2} if len(sys.argv) > 3 else {}),
    )
    print([run["after"] for run in found.runs])

if __name__ == "__main__":
    main()
"""


def test_functions_that_are_made_anew_count_by_their_code(tmp_path, monkeypatch, capsys):
    def run(seed, text=SCRIPT):
        monkeypatch.setattr(sys, "argv", ["study.py", str(tmp_path), seed])
        exec(text.replace("__main__", "none"), made := {"__name__": "none"})
        made["main"]()
        return capsys.readouterr()

    first, second = run("1"), run("2")
    assert ("2 runs, 0 of them done" in first.err, "2 runs, 2 of them done" in second.err) == (True, True)
    assert first.out == second.out
    for old, new in (("nn.ReLU", "nn.Tanh"), ("CLASSES = 3", "CLASSES = 4"), ("argmax(-1) ==", "argmax(-1) >=")):
        assert "2 runs, 0 of them done" in run("1", SCRIPT.replace(old, new)).err


@pytest.mark.slow
def test_a_script_without_a_guard_ends_at_the_first_worker(tmp_path):
    script = tmp_path / "study.py"
    arguments = "import sys\nsys.argv = ['study.py', 'out', '1', 'shared']\n"
    script.write_text(arguments + SCRIPT.split("if __name__", maxsplit=1)[0] + "main()\n")
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, script]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=env, timeout=120)
    assert ended.returncode == 1
    assert ended.stderr.count("Traceback") == ended.stderr.count('Put the call under `if __name__ == "__main__":`') == 1
    assert "taken up again" not in ended.stderr


@pytest.mark.slow
def test_another_process_finds_the_results_of_the_same_script(tmp_path):
    """Lambdas and functions of the script included; processes of this machine compute what is missing."""
    pytest.importorskip("cloudpickle")
    script = tmp_path / "study.py"
    script.write_text(SCRIPT)

    def run(*arguments, text=SCRIPT):
        script.write_text(text)
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": arguments[0]}
        command = [sys.executable, script, tmp_path / "out", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, env=env)

    first = run("1", "shared")
    assert "2 runs, 0 of them done" in first.stderr
    second = run("2")
    assert "2 runs, 2 of them done" in second.stderr
    assert first.stdout == second.stdout
    assert "2 runs, 0 of them done" in run("3", text=SCRIPT.replace("nn.ReLU", "nn.Tanh")).stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".lock", "compare.json", "runs"]


def test_an_executor_computes_the_runs_and_stays_open(study, tmp_path):
    with ThreadPoolExecutor(2) as executor:
        found = study(out=tmp_path, executor=executor)
        assert executor.submit(int, 3).result() == 3
    assert figures(found) == figures(study())
    assert not list(tmp_path.glob(".*.conservtl-tmp"))


def test_a_process_that_imports_its_script_begins_no_study(study, tmp_path, monkeypatch):
    monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)
    with pytest.raises(ctl.SpecError, match=r'Put the call under `if __name__ == "__main__":`'):
        study(out=tmp_path, processes=2)
    assert not list(tmp_path.iterdir())


def test_a_sweep_keeps_its_runs_too(source, held_out, quick, network, examples, tmp_path, counted):
    def run(**more):
        return ctl.sweep(network, source, examples(24), held_out, quick, seeds=1, numbers=[1], sides=["input"],
                         controls=False, strengths=[1], **more)  # fmt: skip

    first = run(out=tmp_path)
    assert figures(first) == figures(run())
    counted.clear()
    assert run(out=tmp_path).best == first.best
    assert not counted
    assert (tmp_path / "sweep.json").is_file()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"executor": "dask:tcp://localhost:1"},
            "workers of executor 'dask:tcp://localhost:1' write their results to a",
        ),
        ({"executor": "proceses"}, "executor: must be one of processes.*Did you mean 'processes'"),
        ({"executor": 3}, r"executor must be a name or a concurrent\.futures\.Executor; received int"),
        ({"processes": 0}, "processes must be a number of processes, 1 at least; received 0"),
        ({"processes": True}, "received True"),
        ({"processes": 2, "executor": ThreadPoolExecutor(1), "out": "x"}, "has workers of its own. Leave one out"),
        ({"out": 3}, "out must be the path of a folder; received int"),
        ({"out": __file__}, "is a file. Give a folder"),
    ],
)
def test_wrong_places_are_refused(study, change, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ctl.SpecError, match=message):
        study(**change)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["model", "loss", "augment"])
def test_parts_that_cannot_be_pickled_are_named_before_a_run(study, tmp_path, counted, name, network):
    lock = threading.Lock()

    def held(*arguments):
        with lock:
            return network() if not arguments else torch.nn.functional.cross_entropy(arguments[0], arguments[1][1])

    said = rf"{name} cannot be pickled: .*lock.*\. Leave out what belongs to this process alone, such as a lock"
    with ThreadPoolExecutor(1) as executor, pytest.raises(ctl.SpecError, match=said):
        study(out=tmp_path, executor=executor, **{name: held})
    assert not counted
    assert not list(tmp_path.glob("runs/*"))


def test_the_attribute_that_cannot_be_pickled_is_named(study, tmp_path):
    class Loss:
        def __init__(self):
            self.inner = torch.nn.Sequential(torch.nn.ReLU())
            self.inner[0].guard = threading.Lock()

        def __call__(self, outputs, batch):
            return torch.nn.functional.cross_entropy(outputs, batch[1])

    with ThreadPoolExecutor(1) as executor, pytest.raises(ctl.SpecError, match=r"and loss\.inner\.0\.guard cannot be"):
        study(out=tmp_path, executor=executor, loss=Loss())


def test_functions_of_a_test_need_cloudpickle(study, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cloudpickle", None)
    with ThreadPoolExecutor(1) as executor, pytest.raises(ctl.SpecError, match=r"augment cannot be pickled: .*Define"):
        study(out=tmp_path, executor=executor, augment=lambda batch, generator: batch)
