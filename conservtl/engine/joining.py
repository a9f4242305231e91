"""Connection of a launcher's processes, whether they are started for the first time or anew."""

from __future__ import annotations

import os
import time
import uuid
from datetime import timedelta
from typing import Any

import torch
from torch import distributed as dist

from conservtl.errors import ProcessLostError, SpecError

__all__ = ["is_launched", "join", "must_join", "restarts"]

_KEY = "conservtl/start"
_JOINING = timedelta(minutes=30)  # in which all processes must be there, as torch gives them
_TALKING = timedelta(hours=2)  # between two words: the first process may train a source model meanwhile


def is_launched() -> bool:
    """Return whether a launcher (``torchrun``, ``accelerate launch``) started this process, or one is connected."""
    return (dist.is_available() and dist.is_initialized()) or {"RANK", "WORLD_SIZE"} <= os.environ.keys()


def must_join() -> bool:
    """Return whether a launcher started this process with others, to which it is not connected yet."""
    return is_launched() and not dist.is_initialized() and int(os.environ["WORLD_SIZE"]) > 1


def restarts() -> int:
    """Return how often torchrun has started the processes of this machine anew because one was lost."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def join(device: str) -> None:
    """Connect this process with the others of its launcher.

    Args:
        device: cpu or cuda: where the model is trained.

    Raises:
        SpecError: the launcher's environment is not complete.
        ProcessLostError: another process has stopped meanwhile.
    """
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    known: Any = dist  # torch's types leave out half of it
    try:
        store, rank, world = next(known.rendezvous("env://", timeout=_JOINING))
        if dist.is_torchelastic_launched():
            store = known.PrefixStore(_word_of_start(store, rank, world), store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=_TALKING)
    except ValueError as error:
        raise SpecError(
            f"the processes of a launcher need RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; {error}. Start them "
            "with torchrun, or unset RANK and WORLD_SIZE."
        ) from error
    except RuntimeError as error:  # torch has no class of its own for it
        own = int(os.environ["RANK"])
        raise ProcessLostError([], int(os.environ["WORLD_SIZE"]), first=own) from error


def _word_of_start(store: Any, rank: int, world: int) -> str:
    """Return a word that the processes of one start have in common, and those of no other.

    torchrun keeps its store when it starts processes anew: the addresses that dead ones left there would be taken for
    those of the living. Each process gives a word of its own; the first one answers it with the word of this start,
    and goes on once all have confirmed that.
    """
    own = uuid.uuid4().hex
    if rank:
        store.set(f"{_KEY}/{rank}", own)
        word = str(store.get(f"{_KEY}/answer/{own}").decode())
        store.set(f"{_KEY}/confirmed/{word}/{own}", "")
        return word
    until, waiting = time.monotonic() + _JOINING.total_seconds(), set(range(1, world))
    while waiting:
        for other in sorted(waiting):
            if store.check([f"{_KEY}/{other}"]):
                theirs = store.get(f"{_KEY}/{other}").decode()
                store.set(f"{_KEY}/answer/{theirs}", own)
                if store.check([f"{_KEY}/confirmed/{own}/{theirs}"]):
                    waiting.remove(other)
        if time.monotonic() > until:
            raise RuntimeError("some processes did not come")
        time.sleep(0.01)
    return own
