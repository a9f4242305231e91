"""Batch sizes that fit into memory: found before training, or named when a step has run out of it."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch

from conservtl.batches import batch_size as size_of
from conservtl.batches import map_tensors
from conservtl.engine.batch import Batches
from conservtl.engine.evaluation import Functions
from conservtl.engine.randomness import preserve_rng
from conservtl.engine.resizing import resized, sizes_of
from conservtl.engine.session import Session
from conservtl.engine.training import with_found
from conservtl.errors import MemoryLimitError, SpecError
from conservtl.runtime.preserve import preserve_buffers, preserve_modes

__all__ = ["find_batch_size", "is_out_of_memory", "largest", "out_of_memory"]

_SPARE = 0.1  # share of a GPU's memory that must stay free: later batches may be longer, and memory in pieces
_SIGNS = ("can't allocate memory", "not enough memory", "out of memory")


def find_batch_size(session: Session, functions: Functions, train: Any, batches: Batches) -> Batches:
    """Find the batch size if the settings leave it open; set it in the session's settings with ``accumulate``.

    A step is made of forward pass, loss with the plan's terms and backward pass, beside memory as large as the
    optimizer's state, in the phase that trains most. Weights, buffers and random generators stay.

    Raises:
        SpecError: the data has batches of its own, or parameters are sharded.
        MemoryLimitError: a step does not fit even with the smallest size.
    """
    training, processes = session.training, session.processes
    if training.batch_size != "auto":
        return batches
    if session.shards:
        raise SpecError(
            "training.batch_size is auto, but the parameters are sharded once training begins, so a step takes less "
            "memory then. Name a number, or set distributed to ddp."
        )
    sizes = sizes_of(session, train, batches)
    adaptation, phase = session.adaptation, session.adaptation.phase
    frozen = [adaptation.plan.frozen_in(number) for number in range(len(adaptation.plan.phases))]
    adaptation.start_phase(min(range(len(frozen)), key=lambda number: len(frozen[number])))

    def fits(size: int) -> bool:
        return all(_fits(session, functions, make, reserve=True) for make in sizes.largest(size))

    try:
        found = largest(sizes.candidates, fits)
        if found is None and sizes.candidates[0] > 1 and fits(1):
            found = 1
    finally:
        adaptation.start_phase(phase)
    size = min(processes.gathered(found or 0))  # the least of all processes
    if not size:
        raise MemoryLimitError(
            f"training.batch_size is auto, but a step runs out of memory on {session.device} with one {sizes.unit} "
            "already. Freeze more layers, or use a smaller model."
        )
    session.training = with_found(training, sizes.settings(size))
    return resized(session, train, batches)


def largest(candidates: Sequence[int], fits: Callable[[int], bool]) -> int | None:
    """Return the largest of ascending sizes that fits, by doubling and then bisection; None if none does."""
    good, bad = -1, len(candidates)
    while bad == len(candidates) and good < bad - 1:
        wanted = 2 * candidates[good] if good >= 0 else 0
        place = next((i for i in range(good + 1, bad) if candidates[i] >= wanted), bad - 1)
        good, bad = (place, bad) if fits(candidates[place]) else (good, place)
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(candidates[middle]) else (good, middle)
    return None if good < 0 else candidates[good]


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out, on a GPU or a CPU."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def out_of_memory(session: Session, functions: Functions, content: Any, first: str) -> MemoryLimitError:
    """Return the error for a batch that did not fit; alone, it names the batch size and ``accumulate`` that would."""
    size, accumulate = size_of(content), session.training.accumulate
    begun = f"a step with training.batch_size={size} and accumulate={accumulate} ran out of memory on {session.device}"
    processes = session.processes
    if processes.many:  # trials would exchange gradients with the steps of the others
        return MemoryLimitError(
            f"{begun} in process {processes.rank} of {processes.world} ({first}). Halve batch_size and double "
            "accumulate, which makes the same steps, or set batch_size to auto."
        )
    divisors = [number for number in range(1, size) if size % number == 0]

    def part(number: int) -> Any:
        return map_tensors(content, lambda one: one[:number] if one.ndim and len(one) == size else one)

    fitting = largest(divisors, lambda number: _fits(session, functions, lambda: part(number), reserve=False))
    if fitting is None:
        return MemoryLimitError(f"{begun} ({first}), and no part of the batch fits. Freeze more layers, or use a "
                                "smaller model.")  # fmt: skip
    return MemoryLimitError(
        f"{begun} ({first}). batch_size={fitting} with accumulate={accumulate * size // fitting} fits and makes the "
        "same steps; batch_size: auto finds it for data that fit batches."
    )


def _fits(session: Session, functions: Functions, make: Callable[[], Any], *, reserve: bool) -> bool:
    """Return whether forward and backward pass of a batch fit into memory; everything is restored."""
    model, cuda = session.adaptation.model, session.device.type == "cuda"
    failed = False
    generators = [] if session.proxies is None else [session.proxies.generator]
    with preserve_modes(model), preserve_buffers(model), preserve_rng(generators):
        session.train()
        try:
            _try(session, functions, make, reserve=reserve)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            failed = True
        model.zero_grad()
    if failed:
        gc.collect()  # tensors of the step hang on frames
    if cuda:
        torch.cuda.empty_cache()
    return not failed


def _try(session: Session, functions: Functions, make: Callable[[], Any], *, reserve: bool) -> None:
    """Make a step but for the optimizer's, whose state is stood in for."""
    if session.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(session.device)
    trained = [one for one in session.adaptation.model.parameters() if one.requires_grad]
    state = [torch.empty_like(one) for one in trained for _ in range(2)] if reserve else []
    content = make()
    others = None if session.proxies is None else session.proxies(content)
    with session.autocast():
        loss = session.loss(functions, content, others=others)
    if loss.requires_grad:
        loss.backward()  # type: ignore[no-untyped-call]
    if reserve and session.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(session.device)
        others = total - free - torch.cuda.memory_reserved(session.device)
        if others + torch.cuda.max_memory_allocated(session.device) > (1 - _SPARE) * total:
            raise torch.OutOfMemoryError("too little memory would be left")
    del state
