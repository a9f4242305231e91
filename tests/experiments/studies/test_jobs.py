"""Workers by themselves: futures of a cluster's jobs, an executor that breaks, trials that another process has."""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError, Executor, ThreadPoolExecutor
from types import SimpleNamespace

import pytest

import conservtl as ctl
from conservtl.experiments.own.sending import read_sent
from conservtl.experiments.run.adapted import Adapted
from conservtl.experiments.studies.executors._submitit import _Jobs
from conservtl.experiments.studies.executors.dispatch import Workers
from conservtl.experiments.studies.result_store import _run_and_store
from conservtl.experiments.studies.trial_claims import Claims


class Cluster:
    """Submits jobs that end when they are told to."""

    def __init__(self):
        self.jobs, self.submitted = [], threading.Semaphore(0)

    def submit(self, function, *arguments, **named):
        job = SimpleNamespace(ended=threading.Event(), cancelled=False)
        job.done, job.result = job.ended.is_set, lambda: function(*arguments, **named)
        job.cancel = lambda check: vars(job).update(cancelled=not check)
        self.jobs.append(job)
        self.submitted.release()
        return job


def test_jobs_wait_for_the_limit_and_give_their_results():
    cluster = Cluster()
    jobs = _Jobs(cluster, 1, 0.001)
    first, second = jobs.submit(divmod, 7, 2), jobs.submit(int, "x")
    assert cluster.submitted.acquire(timeout=60)
    assert len(cluster.jobs) == 1
    cluster.jobs[0].ended.set()
    assert first.result(60) == (3, 1)
    assert cluster.submitted.acquire(timeout=60)
    cluster.jobs[1].ended.set()
    assert "invalid literal" in str(second.exception(60))
    jobs.shutdown()
    with pytest.raises(RuntimeError, match="shutdown"):
        jobs.submit(int)


@pytest.mark.parametrize("wait", [False, True])
def test_jobs_that_run_and_jobs_that_wait_are_cancelled(wait):
    cluster = Cluster()
    jobs = _Jobs(cluster, 1, 0.001)
    jobs.submit(int)
    waiting = [jobs.submit(int), jobs.submit(int)]
    assert cluster.submitted.acquire(timeout=60)
    waiting[0].cancel()
    jobs.shutdown(wait=wait, cancel_futures=True)
    assert [job.cancelled for job in cluster.jobs] == [True]
    for future in waiting:
        with pytest.raises(CancelledError):
            future.result(60)


def test_a_future_that_is_cancelled_in_the_queue_makes_no_job():
    cluster = Cluster()
    jobs = _Jobs(cluster, 1, 0.001)
    first, second, third = (jobs.submit(int, number) for number in "123")
    assert cluster.submitted.acquire(timeout=60)
    assert second.cancel()
    cluster.jobs[0].ended.set()
    assert cluster.submitted.acquire(timeout=60)
    cluster.jobs[1].ended.set()
    assert (first.result(60), third.result(60), len(cluster.jobs)) == (1, 3, 2)
    jobs.shutdown()


class Broken(Executor):
    """Takes no work."""

    def submit(self, *_, **__):
        raise RuntimeError("a process was terminated abruptly")


class Nothing:
    """Work that has no runs."""

    def run(self):
        return None

    def rest(self):
        return []


def test_a_broken_executor_of_ones_own_is_opened_again():
    opened = iter([Broken(), ThreadPoolExecutor(1)])
    workers = Workers("mine", lambda: next(opened))
    assert workers.submit(Nothing()).result(60) is None
    workers.close(cancel=False)


def test_trials_of_no_process_or_of_another_folder_are_left_alone(tmp_path):
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study()
    processes = [None, tmp_path / "own", "/elsewhere/processes/one", tmp_path / "processes" / "killed"]
    for process in processes:
        trial = study.ask()
        if process is not None:
            trial.set_user_attr("process", str(process))
    released = []
    claims = Claims(study, None, tmp_path, tmp_path / "own", 1, print)
    claims._release = lambda trial: released.append(trial.number)
    claims._release_killed()
    assert released == [3]


def test_a_result_that_is_there_stays(tmp_path):
    (tmp_path / "a.json").write_text("kept")
    _run_and_store(SimpleNamespace(key="a"), tmp_path)
    assert (tmp_path / "a.json").read_text() == "kept"


def test_a_problem_that_is_another_than_the_studys_is_refused(tmp_path):
    (tmp_path / "problem").write_bytes(b"other")
    with pytest.raises(ctl.SpecError, match="must be the file that the study wrote; it has changed"):
        read_sent(str(tmp_path / "problem"), "0" * 64)


def test_windows_of_a_file_that_cannot_be_read():
    def windows(file):
        raise ctl.DataError(f"{file} is cut short")
        yield

    adapted = Adapted(None, (), SimpleNamespace(windows=windows), None)
    with pytest.raises(ctl.DataError, match=r"a\.wav is cut short"):
        adapted._from_windows({0: "a.wav"}, None)
    skipped = {}
    assert adapted._from_windows({0: "a.wav"}, skipped) == {}
    assert skipped == {"a.wav": "a.wav is cut short"}
