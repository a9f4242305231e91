"""Proxies: changed copies of the inputs, on which terms compare the model with the source."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from conservtl.batches import map_tensors, tensors_of
from conservtl.engine.processes import Processes
from conservtl.errors import SpecError

__all__ = ["Proxies", "check_proxies"]

_OTHERWISE = 0x5DEECE66D  # from the augmentation's seed, which may be drawn in the same state


class Proxies:
    """Makes other inputs of each batch, with draws from a generator of its own.

    Args:
        make: (batch, generator) -> batch.
        device: of the generator.
        processes: each draws otherwise.
    """

    def __init__(self, make: Callable[[Any, torch.Generator], Any], device: torch.device, processes: Processes) -> None:
        self._make = make
        self.generator = torch.Generator(device)
        with torch.random.fork_rng(devices=[]):  # batches and augmentation are drawn as without proxies
            seed = int(torch.randint(2**62, ())) ^ _OTHERWISE
        self.generator.manual_seed(seed + processes.rank)

    def __call__(self, batch: Any) -> Any:
        """Return a batch of other inputs; a function that writes into its argument leaves the batch as it is."""
        others = self._make(map_tensors(batch, torch.clone), self.generator)
        if not tensors_of(others):
            raise SpecError(
                f"proxies must return a batch, with a tensor of inputs; received {type(others).__name__}. Return what "
                "forward takes."
            )
        return others


def check_proxies(proxies: Any) -> None:
    """Raise unless proxies are None or a function."""
    if proxies is not None and not callable(proxies):
        raise SpecError(f"proxies must be a function (batch, generator) -> batch; received {proxies!r:.60}. Pass one.")
