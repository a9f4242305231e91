"""Mixing weights with their anchors by masks that are drawn in the program, and drawn again for the gradients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from conservtl.kernels.fused import launch
from conservtl.kernels.fused.members import Members
from conservtl.kernels.fused.table import Addresses, uploaded
from conservtl.kernels.philox import identity

__all__ = ["Mixing"]


class Mixing:
    """Memory for the plain weights of some parameters, and what their masks are drawn by."""

    def __init__(self, members: Members, names: Sequence[str]) -> None:
        self._members = members
        self.names = list(names)
        self._identities = uploaded([identity(name) for name in names], torch.int64, members.device)
        places = [-(-size // 16) * 16 for size in members.sizes]  # each begins where a word of 16 bytes does
        memory = torch.empty(sum(places), dtype=members.dtype, device=members.device)
        pieces = torch.split(memory, places)
        self._plain = {
            name: piece[:0].view(weight.shape)
            if not weight.numel()
            else piece.as_strided(weight.shape, weight.stride())
            for name, piece, weight in zip(names, pieces, members.weights, strict=True)
        }
        self._addresses = Addresses(members.device)
        self.kept: dict[str, list[str]] = {}
        """For the caller, as ``Prepared.kept``."""

    @property
    def plains(self) -> Iterable[Tensor]:
        """Memory for the plain weights."""
        return self._plain.values()

    def mix(self, seed: int, step: int, dropped: int) -> Mapping[str, Tensor]:
        """Mix the weights, and return the plain ones by name."""
        plains = self._addresses.to(list(self._plain.values()))
        launch.mix(self._members, self._identities, plains, seed, step, dropped)
        return self._plain

    def unmix(self, which: Sequence[bool] | None, seed: int, step: int, dropped: int, *, restored: bool) -> None:
        """Multiply gradients by the masks of ``mix``, and put back the plain weights if ``restored``."""
        plains = self._addresses.to(list(self._plain.values())) if restored else None
        launch.unmix(self._members, self._identities, plains, which, seed, step, dropped)
