"""Studies over workers of any executor: each run is kept, and a lost worker loses its run only."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch

import conservtl as ctl
from conservtl import plugins
from conservtl.errors import LostWorkerError
from conservtl.experiments.spec.spec import load_spec, with_fields
from conservtl.experiments.studies import result_store
from conservtl.experiments.studies.comparison import compare, plan_trials
from conservtl.experiments.studies.executors import work as work_module
from conservtl.experiments.studies.executors._processes import Processes
from conservtl.experiments.studies.executors.dispatch import Workers, finish
from conservtl.experiments.studies.executors.names import workers_of
from conservtl.experiments.studies.result_store import ResultStore

ROOT = Path(__file__).parents[3]
KILL = signal.raise_signal, signal.SIGKILL
TASK = ROOT / "examples" / "extend" / "toy_task"


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """The spec of a comparison with eight quick runs over four source models; its task is imported by path."""
    before, path, threads = dict(plugins._IMPORTED), list(sys.path), torch.get_num_threads()
    torch.set_num_threads(1)  # here and in the workers: sums split over threads round otherwise
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    plugins.import_modules([str(TASK)])
    quick = ["source.training.epochs=3", "training.epochs=6", "data.source_hums=64", f"source.cache={tmp_path}/cache"]
    section = "compare={targets: [slow clock], seeds: 4, baselines: [source as it is]}"
    monkeypatch.chdir(ROOT)
    yield load_spec(TASK / "spec.yaml", [*quick, section])
    torch.set_num_threads(threads)
    from conservtl.tasks import base

    base._CLASSES.pop("pitch")
    plugins._IMPORTED.clear()
    plugins._IMPORTED.update(before)
    sys.path[:] = path
    for name in [name for name in sys.modules if name.partition(".")[0] == "toy_task"]:
        del sys.modules[name]


@pytest.fixture
def expected(toy, tmp_path):
    """The figures of an undisturbed comparison in this process."""
    return figures(compare(toy, tmp_path / "expected"))


def longer(spec):
    """The spec with runs that take some tenths of a second."""
    return with_fields(spec, {"training.epochs": 60})


def figures(result):
    return [{key: value for key, value in run.items() if key != "seconds"} for run in result["runs"]]


@contextmanager
def child(*command, **more):
    """A process of Python with this source tree, killed at the end."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    running = subprocess.Popen([sys.executable, *command], env=env, stderr=subprocess.PIPE, **more)
    try:
        yield running
    finally:
        running.kill()
        running.communicate()


def story(key, dask_scheduler):
    """The states that a piece of work went through."""
    return [tuple(line[:3]) for line in dask_scheduler.story(key)]


def test_a_dask_worker_that_is_killed_loses_its_run_only(toy, tmp_path):
    """A scheduler and two workers on loopback; one is killed in a run, and the other one takes that up."""
    distributed = pytest.importorskip("distributed")
    file, out = tmp_path / "scheduler.json", tmp_path / "out"
    kept, interrupted = {}, []
    dask = ("-m", "dask")
    with ExitStack() as stack:
        host = ("--scheduler-file", str(file), "--no-dashboard")
        stack.enter_context(child(*dask, "scheduler", "--host", "127.0.0.1", "--port", "0", *host, cwd=tmp_path))
        deadline = time.monotonic() + 120
        while not (file.is_file() and file.read_text().endswith("}")) and time.monotonic() < deadline:
            time.sleep(0.05)
        own = (*dask, "worker", *host, "--nthreads", "1", "--no-nanny", "--name")
        workers = {name: stack.enter_context(child(*own, name, cwd=tmp_path)) for name in ("first", "second")}
        address = json.loads(file.read_text())["address"]
        client = stack.enter_context(distributed.Client(address, set_as_default=False))
        client.wait_for_workers(2, timeout=120)

        def kill():
            """Kill the first worker in the middle of a piece of work, once a result is there."""
            while not kept:
                kept.update((path.name, path.read_bytes()) for path in (out / "runs").glob("*.json"))
            where = {info["name"]: worker for worker, info in client.scheduler_info()["workers"].items()}
            while not interrupted:
                interrupted.extend(client.processing([where["first"]])[where["first"]])
            workers["first"].kill()

        killer = threading.Thread(target=kill)
        killer.start()
        result = compare(longer(toy), out, executor=f"dask:{address}")
        killer.join(120)
        assert workers["first"].wait(120) == -signal.SIGKILL
        assert workers["second"].poll() is None
        begun = [line for line in client.run_on_scheduler(story, interrupted[-1]) if line[2] == "processing"]
        assert len(begun) == 2, "it was begun by the one and again by the other"
    assert figures(result) == figures(compare(longer(toy), tmp_path / "expected"))
    assert kept
    assert all((out / "runs" / name).read_bytes() == content for name, content in kept.items())


def test_jobs_of_submitit(toy, expected, tmp_path):
    """On this machine; on a cluster the same jobs wait in Slurm's queue."""
    pytest.importorskip("submitit")
    toy = toy.model_copy(update={"compare": toy.compare.model_copy(update={"seeds": 2})})
    result = compare(toy, tmp_path / "out", executor=f"submitit:{tmp_path}/logs?cluster=local&partition=gpu&jobs=2")
    assert figures(result) == expected[:4]
    assert list((tmp_path / "logs").glob("*.out"))


class Deadly(Executor):
    """Calls at once in this process, and loses the first ``times`` of them."""

    def __init__(self, times):
        self.times, self.calls = times, 0

    def submit(self, function, /, *arguments):
        self.calls += 1
        future = Future()
        if self.calls <= self.times:
            future.set_exception(ConnectionResetError("the worker is gone"))
        else:
            future.set_result(function(*arguments))
        return future


def test_a_run_is_taken_up_again_and_that_is_said_once(toy, expected, tmp_path):
    said = []
    result = compare(toy, tmp_path / "out", executor=Deadly(4), say=said.append)
    assert figures(result) == expected
    lost = [line for line in said if "worker was lost" in line]
    assert len(lost) == len(set(lost)) == 4
    assert "slow clock, seed 0): its worker was lost (ConnectionResetError: the worker is gone)" in lost[0]
    assert said[-1] == "8 of 8 runs"


@pytest.mark.usefixtures("toy")
class TestDispatch:
    """Of work that is made up: what is counted, what is given up."""

    def run_all(self, works, executor):
        said, counts = [], []
        error = None
        try:
            for count in finish(works, Workers("mine", lambda: executor, owned=False), said.append):
                counts += [count]
        except ctl.ConservtlError as caught:
            error = caught
        return counts, said, error

    def test_one_that_loses_each_worker_is_given_up_and_the_others_end(self, tmp_path):
        """Three attempts each; what shares its worker is finished."""

        class Picky(Deadly):
            def submit(self, function, /, content, *rest):
                self.times = self.calls + 1 if b"poison" in content else 0
                return super().submit(function, content, *rest)

        works = [Noted(tmp_path, ("a", "poison")), Noted(tmp_path, ("b",))]
        executor = Picky(0)
        counts, said, error = self.run_all(works, executor)
        assert isinstance(error, LostWorkerError)
        assert "must end within 3 attempts" in str(error)
        assert "poison (ConnectionResetError" in str(error)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
        assert sum(counts) == 2
        assert len(said) == 2

    def test_errors_of_the_work_are_raised_and_what_waits_is_cancelled(self, tmp_path):
        works = [Noted(tmp_path, ("bad",)), Noted(tmp_path, ("b",))]
        error = self.run_all(works, Deadly(0))[2]
        assert isinstance(error, ctl.DataError)
        assert str(error) == "no such word"

    def test_an_interruption_cancels_what_waits_and_keeps_what_is_finished(self, tmp_path):
        """One thread: the first piece is in progress and ends, the others never begin."""
        pool = ThreadPoolExecutor(1)
        begun = finish([Noted(tmp_path, (name,)) for name in "abc"], Workers("mine", lambda: pool), print)
        before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in the background
        try:
            threading.Timer(0.3, os.kill, [os.getpid(), signal.SIGINT]).start()
            with work_module._ONE_AT_A_TIME, pytest.raises(KeyboardInterrupt):
                list(begun)
        finally:
            signal.signal(signal.SIGINT, before)
        pool.shutdown()
        assert [path.name for path in tmp_path.iterdir()] == ["a"]

    def test_a_broken_executor_that_the_caller_keeps(self, tmp_path):
        with ProcessPoolExecutor(1) as pool:
            pool.submit(*KILL).exception()
            error = self.run_all([Noted(tmp_path, ("a",))], pool)[2]
        assert isinstance(error, LostWorkerError)
        assert "ProcessPool" in str(error)
        assert "takes no more work" in str(error)


class Noted:
    """Work that leaves a file for each of its names."""

    def __init__(self, folder, names):
        self.folder, self.names = folder, names

    @property
    def name(self):
        return self.names[0]

    def __len__(self):
        return len(self.names)

    def __reduce__(self):
        return Noted, (self.folder, self.names)

    def run(self):
        for name in self.names:
            if name == "bad":
                raise ctl.DataError("no such word")
            (self.folder / name).touch()

    def rest(self):
        return [Noted(self.folder, (name,)) for name in self.names if not (self.folder / name).exists()]


def test_local_processes_are_apart():
    """The kernel ends one process; the other one's work goes on, and a new process takes the place."""
    with Processes(2) as pool:
        other = pool.submit(time.sleep, 1.0)
        lost = pool.submit(*KILL)
        assert "terminated abruptly" in str(lost.exception(120))
        assert other.result(120) is None
        assert pool.submit(os.getpid).result(120) != os.getpid()
        unguarded = pool.submit(os._exit, 87).result(120)  # as a process whose script begins the study again
        assert isinstance(unguarded, ctl.SpecError)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc")
def test_local_processes_end_with_the_study(tmp_path):
    kills = pytest.importorskip("kills")  # of tests/faults

    def study():
        (tmp_path / "number").write_text(str(Processes(1).submit(os.getpid).result()))
        time.sleep(300)

    child = kills.start(study, tmp_path / "output")
    until(lambda: (tmp_path / "number").exists() and (tmp_path / "number").read_text())
    process = Path("/proc") / (tmp_path / "number").read_text()
    assert process.is_dir()
    os.kill(child, signal.SIGKILL)
    assert kills.end_of(child) == -signal.SIGKILL
    until(lambda: not process.is_dir() or ") Z " in (process / "stat").read_text())


def until(happened, seconds=120):
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.01)


class TestNames:
    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("procesess", r"executor: must be one of processes, dask:ADDRESS, .*'procesess'.*Did you mean 'processes'"),
            ("dask", "executor: must be one of"),
            ("dask:", r"received 'dask:', without the scheduler's address\. Write dask:tcp://host:8786\."),
            ("submitit:", "executor: must be one of"),
            ("nowhere:pool", r"executor 'nowhere:pool': nowhere was not imported\. Add --import nowhere"),
            ("submitit:?partition=gpu", "needs a folder for its logs"),
            ("submitit:logs", "this machine has no Slurm"),
            ("submitit:logs?cluster=local&jobs=0", "jobs must be a number from 1 up; received 0"),
            ("submitit:logs?cluster=local&timeout_min=soon", '"timeout_min" expected type'),
            ("submitit:logs?cluster=local&partitoin=gpu", "Unknown argument 'partitoin'"),
            ("submitit:logs?cluster=pbs", "any executor named pbs"),
        ],
    )
    def test_one_that_cannot_be_had(self, name, message, tmp_path, monkeypatch):
        if name.startswith("submitit"):
            pytest.importorskip("submitit")
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ctl.SpecError, match=message):
            workers_of(name, 1)

    def test_a_scheduler_that_does_not_answer(self, monkeypatch):
        pytest.importorskip("distributed")
        from conservtl.experiments.studies.executors import _dask

        monkeypatch.setattr(_dask, "_SECONDS", 0.3)
        with pytest.raises(ctl.SpecError, match=r"'dask:tcp://127\.0\.0\.1:9': a Dask scheduler must answer there"):
            workers_of("dask:tcp://127.0.0.1:9", 1)

    @pytest.mark.parametrize(("library", "name"), [("distributed", "dask:tcp://host:8786"), ("submitit", "submitit:x")])
    def test_a_library_that_is_missing(self, library, name, monkeypatch):
        monkeypatch.setitem(sys.modules, library, None)
        extra = {"distributed": "dask", "submitit": "slurm"}[library]
        with pytest.raises(ctl.MissingExtraError, match=rf"conservtl\[{extra}\]"):
            workers_of(name, 1)

    def test_processes_are_of_this_machine(self):
        with pytest.raises(ctl.SpecError, match="received 4 with executor 'dask:x', which has workers of its own"):
            workers_of("dask:x", 4)

    def test_a_name_is_checked_before_a_dry_run(self, toy, tmp_path):
        with pytest.raises(ctl.SpecError, match="must be one of"):
            compare(toy, tmp_path / "out", executor="daks", dry_run=True)

    def test_one_of_a_users_own(self, tmp_path, monkeypatch):
        (tmp_path / "own_pool.py").write_text(
            "from concurrent.futures import ThreadPoolExecutor\n"
            "def two(): return ThreadPoolExecutor(2)\ndef wrong(): return 3\nsize = 2\n"
        )
        monkeypatch.setattr(plugins, "_IMPORTED", {})
        monkeypatch.setattr(sys, "path", list(sys.path))
        plugins.import_modules([str(tmp_path / "own_pool.py")])
        workers = workers_of("own_pool:two", 1)
        assert list(finish([Noted(tmp_path, ("a",)), Noted(tmp_path, ("b",))], workers, print)) == [1, 1]
        with pytest.raises(RuntimeError, match="after shutdown"):
            workers._executor.submit(print)
        with pytest.raises(ctl.SpecError, match=r"must return a concurrent\.futures\.Executor; it returns 3"):
            workers_of("own_pool:wrong", 1)
        with pytest.raises(ctl.SpecError, match=r"own_pool has no function 'tow'.*'two'"):
            workers_of("own_pool:tow", 1)
        del sys.modules["own_pool"]


class TestWorker:
    """Of work that another machine does."""

    def test_it_needs_the_studys_files(self, tmp_path):
        content, _, versions = work_module.packed(Noted(tmp_path, ("a",)))
        error = work_module.carry_out(content, str(tmp_path / "gone"), versions)
        assert isinstance(error, ctl.SpecError)
        assert "must see the study's files" in str(error)

    def test_it_needs_the_studys_versions(self, tmp_path):
        """Before anything is unpickled, which another version may not be able to."""
        error = work_module.carry_out(b"", str(tmp_path), {"conservtl": "0.0.1", "torch": "2.0"})
        assert isinstance(error, ctl.SpecError)
        assert "must have the study's versions, conservtl 0.0.1, torch 2.0" in str(error)

    def test_it_works_in_the_studys_folder_and_goes_back(self, tmp_path, monkeypatch):
        (tmp_path / "study").mkdir()
        (tmp_path / "worker").mkdir()
        monkeypatch.chdir(tmp_path / "study")
        arguments = work_module.packed(Noted(Path(), ("a",)))
        monkeypatch.chdir(tmp_path / "worker")
        assert work_module.carry_out(*arguments) is None
        assert (tmp_path / "study" / "a").is_file()
        assert Path.cwd() == tmp_path / "worker"

    def test_an_error_that_cannot_be_sent_is_sent_as_text(self, tmp_path):
        class LocalError(Exception):
            pass

        found = work_module._portable(LocalError("why"))
        assert type(found) is RuntimeError
        assert "LocalError: why" in str(found)

    def test_a_result_that_is_there_stays(self, toy, tmp_path, monkeypatch):
        """A worker given up for lost ends after the one that took its run up: the first result is kept."""
        trial = plan_trials(toy)[0]
        store = ResultStore(tmp_path)
        (path := tmp_path / "runs" / f"{trial.key}.json").parent.mkdir()

        def meanwhile(trial):
            path.write_text('{"first": 1}')
            return {"second": 2}

        monkeypatch.setattr(result_store, "run_trial", meanwhile)
        assert store.results([trial])[0]["first"] == 1

    def test_a_result_that_is_damaged_is_made_again(self, toy, tmp_path, monkeypatch):
        trial, said = plan_trials(toy)[0], []
        (path := tmp_path / "runs" / f"{trial.key}.json").parent.mkdir()
        path.write_text('{"cut": ')
        monkeypatch.setattr(result_store, "run_trial", lambda trial: {"whole": 1})
        assert ResultStore(tmp_path, said.append).results([trial], executor=Deadly(0))[0]["whole"] == 1
        assert "is damaged and is made again" in said[0]
