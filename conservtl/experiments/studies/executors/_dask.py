"""A Dask cluster as an executor."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

from conservtl.errors import SpecError
from conservtl.extras import require

__all__ = ["dask_executor"]

_SECONDS = 10  # to wait for an answer


def dask_executor(address: str) -> Executor:
    """Connect to a Dask scheduler.

    Args:
        address: of the scheduler, ``tcp://host:8786``, or the path of its file, ``scheduler.json``.

    Raises:
        SpecError: no scheduler answers.
        MissingExtraError: Dask is not installed.
    """
    distributed = require("distributed", "dask")
    place = {"scheduler_file": address} if address.endswith(".json") else {"address": address}
    try:
        client = distributed.Client(**place, timeout=_SECONDS, set_as_default=False)
    except (OSError, ValueError) as error:
        raise SpecError(
            f"executor 'dask:{address}': a Dask scheduler must answer there; {str(error).splitlines()[0]:.200}. Start "
            "`dask scheduler`, and `dask worker --nthreads 1` on each machine, or correct the address."
        ) from error
    return _Cluster(client)


class _Cluster(Executor):
    """The executor of a client, which it closes. The scheduler itself moves the work of a worker that dies."""

    def __init__(self, client: Any) -> None:
        self._client, self._executor = client, client.get_executor(pure=False)

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **named: Any) -> Future[Any]:
        future: Future[Any] = self._executor.submit(function, *arguments, **named)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._executor.shutdown(wait=wait and not cancel_futures)
        self._client.close(timeout=_SECONDS)
