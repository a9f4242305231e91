"""Processes that share a search: any of them may be killed, and the number of trials stays as asked for."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import conservtl as ctl
from conservtl.experiments.studies import search
from conservtl.experiments.studies.study_storage import opened_storage, shown_url
from conservtl.experiments.studies.tuning import tune

optuna = pytest.importorskip("optuna")
kills = pytest.importorskip("kills")  # of tests/faults
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@pytest.fixture
def marked(speech_fields):
    fields = {**speech_fields, "training": {"epochs": 2, "lr": {"range": [1e-5, 1e-3], "log": True}}}
    fields["data"] = {**fields["data"], "validation": 0.5}
    return fields | {"tune": {"trials": 6}}


def measured(trial, **_):
    """The result of a run, made up from its rate."""
    rate = trial.spec.training.lr
    return {"valid": {"target": 1 - rate, "source": 1 - rate}, "seconds": 0.0}


def until(happened, seconds=120):
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def postgresql():
    """The URL of a server of its own, on a socket in a temporary folder; it refuses to run as root."""
    pytest.importorskip("psycopg")
    found = [shutil.which("initdb"), *map(str, Path("/usr/lib/postgresql").glob("*/bin/initdb"))]
    if not any(found):
        pytest.skip("PostgreSQL is not installed")
    bin_folder = Path(next(path for path in found if path)).parent
    folder = Path(tempfile.mkdtemp())
    as_user = []
    if os.geteuid() == 0:
        as_user = ["setpriv", "--reuid", "postgres", "--regid", "postgres", "--clear-groups"]
        shutil.chown(folder, "postgres", "postgres")

    def call(program, *arguments):
        command = [*as_user, str(bin_folder / program), "-D", str(folder / "data"), *arguments]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=folder, timeout=60)

    call("initdb", "-A", "trust", "-U", "postgres", "--no-sync")
    options = f"-c listen_addresses='' -c unix_socket_directories={folder} -c fsync=off"
    call("pg_ctl", "start", "-w", "-o", options, "-l", str(folder / "log"))
    yield f"postgresql+psycopg://postgres:secret@/postgres?host={folder}"
    call("pg_ctl", "stop", "-m", "immediate")
    shutil.rmtree(folder)


@needs_fork
@pytest.mark.parametrize("kind", ["sqlite", "journal", "postgresql"])
def test_a_process_that_is_killed_loses_no_trial(kind, marked, tmp_path, monkeypatch, request):
    """It is killed in its second trial. The other one, which has run the rest, repeats that with its parameters."""
    out, log, stall = tmp_path / "out", tmp_path / "log", tmp_path / "stall"
    url = {"sqlite": f"sqlite:///{tmp_path}/study.db", "journal": f"journal:{tmp_path}/new/study.log"}.get(kind)
    url = url or request.getfixturevalue(kind)
    monkeypatch.setattr(search, "run_trial", measured)
    tune(marked | {"tune": {"trials": 1}}, tmp_path / "warm")  # reads the data for the processes to come
    marked["tune"]["storage"] = url

    def stalling(trial, **_):
        if (tmp_path / "one").exists():
            stall.write_text(json.dumps(trial.spec.training.lr))
            time.sleep(600)
        (tmp_path / "one").touch()
        return measured(trial)

    def victim():
        search.run_trial = stalling
        tune(marked, out)

    children = [kills.start(victim, tmp_path / "victim")]
    try:
        until(stall.exists)
        children.append(kills.start(lambda: tune(marked, out, say=lambda line: log.open("a").write(f"{line}\n")), log))
        until(lambda: log.exists() and "waits for the trials" in log.read_text())
        before = {trial.number: trial for trial in trials_of(url) if trial.state.is_finished()}
        assert len(before) == 5
        os.kill(children[0], signal.SIGKILL)
        assert kills.end_of(children[0]) == -signal.SIGKILL
        assert kills.end_of(children[1]) == 0, log.read_text()
    finally:
        for child in children:
            try:
                os.kill(child, signal.SIGKILL)
            except ProcessLookupError:
                continue
    trials = trials_of(url)
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * 6
    (repeated,) = [trial for trial in trials if trial.number not in before]
    assert repeated.params == {"training.lr": json.loads(stall.read_text())}
    assert repeated.user_attrs["killed"] == 1
    assert all(trials[number] == trial for number, trial in before.items()), "what was finished is as it was"
    assert f"trial {repeated.number}: its process was killed; it is repeated" in log.read_text()
    result = tune(marked, out)  # again: there is nothing left to do
    assert [trial["number"] for trial in result["trials"]] == list(range(6))
    assert trials_of(url) == trials
    for written in (json.dumps(result), (out / "best.yaml").read_text()):
        assert "secret" not in written
    assert not list((out / ".processes").glob("*")), "locks of processes that are gone are cleared away"


def trials_of(url):
    with opened_storage(url) as storage:
        return optuna.load_study(study_name="conservtl", storage=storage).trials


def test_a_repeated_search_goes_on_and_more_trials_may_be_asked_for(marked, tmp_path, monkeypatch):
    monkeypatch.setattr(search, "run_trial", measured)
    marked["tune"] = {"trials": 2}
    assert [trial["number"] for trial in tune(marked, tmp_path)["trials"]] == [0, 1]
    marked["tune"] = {"trials": 3}
    assert [trial["number"] for trial in tune(marked, tmp_path)["trials"]] == [0, 1, 2]


def test_an_interrupted_trial_is_repeated(marked, tmp_path, monkeypatch):
    rates = []

    def interrupted(trial, **_):
        rates.append(trial.spec.training.lr)
        if len(rates) == 2:
            raise KeyboardInterrupt
        return measured(trial)

    marked["tune"] = {"trials": 3}
    monkeypatch.setattr(search, "run_trial", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tune(marked, tmp_path)
    trials = tune(marked, tmp_path)["trials"]
    assert [trial["state"] for trial in trials] == ["complete"] * 3
    assert rates[1] == rates[2] == trials[1]["params"]["training.lr"]


def test_a_trial_that_kills_its_process_each_time_counts_as_failed(marked, tmp_path, monkeypatch):
    def deadly(trial, **_):
        raise KeyboardInterrupt

    marked["tune"] = {"trials": 1}
    monkeypatch.setattr(search, "run_trial", deadly)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            tune(marked, tmp_path)
    (trial,) = tune(marked, tmp_path)["trials"]
    assert (trial["state"], trial["why"]) == ("failed", "its process was killed 3 times")


def test_over_an_executor_the_number_of_trials_is_the_same(marked, tmp_path):
    marked["tune"] = {"trials": 3, "storage": f"journal:{tmp_path}/study.log"}
    with ThreadPoolExecutor(2) as pool:
        result = tune(marked, tmp_path, executor=pool)
    assert [trial["state"] for trial in result["trials"]] == ["complete"] * 3


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("study.db", r"must be the URL of a database, .*received 'study\.db'\. Write journal:study\.db"),
        ("journal:", "journal: needs a file"),
        ("nosuch://host/x", "the database must answer; NoSuchModuleError"),
        ("sqlite:////nowhere/at/all.db", "the database must answer; OperationalError"),
    ],
)
def test_a_storage_that_cannot_be_had(url, message, marked, tmp_path):
    marked["tune"] |= {"storage": url}
    with pytest.raises(ctl.SpecError, match=f"tune.storage.*{message}"):
        tune(marked, tmp_path)


def test_a_driver_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with (
        pytest.raises(ctl.MissingExtraError, match=r"'postgresql\+psycopg://me:\*\*\*@host/x'.*psycopg"),
        opened_storage("postgresql+psycopg://me:secret@host/x"),
    ):
        pass


def test_passwords_are_not_shown():
    assert shown_url("postgresql://me:se:cret@host:5432/x") == "postgresql://me:***@host:5432/x"
    assert shown_url("postgresql://me@host:5432/x") == "postgresql://me@host:5432/x"


def test_many_machines_need_a_storage_that_all_reach(marked, tmp_path):
    with pytest.raises(ctl.SpecError, match=r"tune\.storage: workers of an executor need a storage"):
        tune(marked, tmp_path, executor="dask:tcp://host:8786")
