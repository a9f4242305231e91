"""Draws of random numbers from other generators than torch's global ones."""

from __future__ import annotations

import gc
import os
import pickle  # states are written and compared; none is read # nosec B403
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["Draws"]


class Draws:
    """Notices whether code draws random numbers, and gives generators their states back.

    Every generator of NumPy and Python that is alive is compared before and after ``watching``, whether the model holds
    it, a closure or another module; those that were there at a ``gc.freeze()`` are not known. New generators are
    noticed by what seeds them (Python's generators and the operating system's entropy), torch's by being passed to its
    functions. Draws from torch's global generators do not count, nor those of a generator of NumPy that the code makes
    from a fixed seed.

    Example:
        >>> with Draws() as draws, draws.watching():
        ...     _ = torch.rand(3)
        >>> draws.found
        False
        >>> with Draws() as draws, draws.watching():
        ...     _ = np.random.default_rng().normal()
        >>> draws.found
        True
    """

    def __init__(self) -> None:
        self.found = False
        self._watches = False
        self._states: list[tuple[Any, Any]] = []
        self._of_torch: dict[torch.Generator, Tensor] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._states = [(generator, _state(generator)) for generator in _alive()]
        self._stack.enter_context(_OwnGenerators(self._passed))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()
        for generator, before in self._states:
            if pickle.dumps(_state(generator)) != pickle.dumps(before):
                _set_state(generator, before)
        for own, state in self._of_torch.items():
            own.set_state(state)
        self._states, self._of_torch = [], {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Set ``found`` if the block draws. A profiler that runs keeps its place; then states alone tell."""
        before = [pickle.dumps(_state(generator)) for generator, _ in self._states]
        profiled = sys.getprofile() is not None
        self._watches = True
        if not profiled:
            sys.setprofile(self._called)
        try:
            yield
        finally:
            if not profiled:
                sys.setprofile(None)
            self._watches = False
        after = [pickle.dumps(_state(generator)) for generator, _ in self._states]
        self.found = self.found or before != after

    def _called(self, frame: Any, event: str, arg: Any) -> None:
        """Note a call into the module ``random``, of its generators or of the system's entropy."""
        if event == "call":
            self.found = self.found or frame.f_code.co_filename == random.__file__
        elif event == "c_call":
            self.found = self.found or arg is os.urandom or isinstance(getattr(arg, "__self__", None), random.Random)

    def _passed(self, generator: torch.Generator) -> None:
        """Note that a generator is passed to a function of torch."""
        self._of_torch.setdefault(generator, generator.get_state())
        self.found = self.found or self._watches


class _OwnGenerators(TorchFunctionMode):
    """Tells of calls of torch with a generator of one's own."""

    def __init__(self, tell: Callable[[torch.Generator], None]) -> None:
        super().__init__()
        self.tell = tell

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(generator := kwargs.get("generator"), torch.Generator):
            self.tell(generator)
        return func(*args, **kwargs)


def _alive() -> list[Any]:
    """Return the generators of NumPy and Python that are alive and have a state."""
    kinds = {kind for base in (np.random.BitGenerator, np.random.RandomState, random.Random) for kind in _family(base)}
    kinds -= set(_family(random.SystemRandom))
    objects = gc.get_objects()
    return [one for one, kind in zip(objects, map(type, objects), strict=True) if kind in kinds]


def _family(kind: type) -> list[type]:
    """Return a class with all its subclasses."""
    children: list[type] = type.__subclasses__(kind)
    return [kind, *(one for child in children for one in _family(child))]


def _state(generator: Any) -> Any:
    if isinstance(generator, random.Random):
        return generator.getstate()
    # RandomState itself keeps every other normal number.
    return generator.get_state() if isinstance(generator, np.random.RandomState) else generator.state


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(state)
    else:
        generator.state = state
