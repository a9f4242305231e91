"""Work shared out over an executor; what a lost worker has not finished is taken up again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from typing import Any

from conservtl.errors import ConservtlError, LostWorkerError
from conservtl.experiments.studies.executors.work import Work, carry_out, packed

__all__ = ["Workers", "finish"]

_RETRIES = 2  # of a run that loses its worker, so that one that kills each worker ends


class Workers:
    """An executor for one study; one that breaks is opened again.

    Args:
        name: for messages.
        open_executor: returns the executor.
        owned: whether it is shut down at the end, and can be opened again.
    """

    def __init__(self, name: str, open_executor: Callable[[], Executor], *, owned: bool = True) -> None:
        self.name, self.owned = name, owned
        self._open = open_executor
        self._executor = open_executor()

    def submit(self, work: Work) -> Future[Exception | None]:
        """Hand over a piece of work."""
        arguments = packed(work)
        try:
            return self._executor.submit(carry_out, *arguments)
        except Exception as error:
            if self.owned:
                self.close(cancel=True)
                self._executor = self._open()
                return self._executor.submit(carry_out, *arguments)
            raise LostWorkerError(
                f"executor: {self.name} takes no more work ({_said(error)}). Finished runs are kept: repeat the call "
                "with another executor."
            ) from error

    def close(self, *, cancel: bool) -> None:
        """Shut an owned executor down."""
        if self.owned:
            self._executor.shutdown(wait=not cancel, cancel_futures=cancel)


def finish(works: Sequence[Work], workers: Workers, say: Callable[[str], None]) -> Iterator[int]:
    """Have all work done; yield the number of runs that each return of a worker has finished.

    Raises:
        ConservtlError: the first that a run raises; what waits is cancelled, results that are finished stay.
        LostWorkerError: a run lost its worker again and again; all others are finished.
    """
    losses: Counter[str] = Counter()
    given_up: list[str] = []
    waiting: dict[Future[Any], Work] = {}
    done = False
    try:
        waiting |= {workers.submit(work): work for work in works}
        while waiting:
            ended = wait(waiting, return_when=FIRST_COMPLETED).done
            for future in [future for future in waiting if future in ended]:
                work = waiting.pop(future)
                lost = _outcome(future)
                rest = list(work.rest()) if lost is not None else []
                yield len(work) - sum(map(len, rest))
                if not rest:
                    continue
                stopped = rest[0].name
                losses[stopped] += 1
                if losses[stopped] == 1:
                    say(f"{stopped}: its worker was lost ({lost}); it is taken up again")
                elif losses[stopped] > _RETRIES:
                    given_up.append(f"{stopped} ({lost})")
                    rest = rest[1:]
                waiting |= {workers.submit(each): each for each in rest}
        done = True
    finally:
        for future in waiting:
            future.cancel()
        workers.close(cancel=not done)
    if given_up:
        raise LostWorkerError(
            f"executor: a run must end within {_RETRIES + 1} attempts, and these lost their worker each time: "
            f"{'; '.join(given_up)}. All others are finished and kept; look for what ends the worker (memory, a time "
            "limit) and repeat the command."
        )


def _outcome(future: Future[Exception | None]) -> str | None:
    """Return None if the work is done, how its worker was lost if it is not; raise what the work raised."""
    try:
        error = future.result()
    except BaseException as lost:  # noqa: BLE001 - of any executor; work returns its own errors
        return _said(lost)
    if isinstance(error, ConservtlError):
        error.__notes__ = []  # its message says it all
    if error is not None:
        raise error
    return None


def _said(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]:.200}" if lines else type(error).__name__
