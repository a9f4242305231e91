"""Where data and cached outputs are held: on the device, within a budget of its memory, or in the host's memory."""

from __future__ import annotations

import torch

from conservtl.errors import SpecError

__all__ = ["Holding"]

_SHARE = 0.5  # largest share of the device's free memory for held data without a budget
_GIB = 1 << 30


class Holding:
    """Budget of a device's memory that the sets of one run share, and what is cached for them.

    Args:
        hold: ``training.hold``: auto, device, host or never.
        memory: ``training.hold_memory``: the budget in GiB; None: half of what is free.
    """

    def __init__(self, hold: str = "auto", memory: float | None = None) -> None:
        self.hold, self.memory, self.taken = hold, memory, 0

    def place(self, size: int, device: torch.device) -> torch.device:
        """Return where to hold tensors of so many bytes, and count them; raise if they must be there and do not fit."""
        host = torch.device("cpu")
        if device.type == "cpu" or self.hold in ("host", "never"):
            return host
        left = self._left(device)
        if size <= left:
            self.taken += size
            return device
        if self.hold == "device":
            raise SpecError(
                f"training.hold is device, but the data takes {size / _GIB:.3g} GiB, and {max(0, left) / _GIB:.3g} GiB "
                f"of {device}'s memory are left for it. Raise training.hold_memory, or set hold to auto."
            )
        return host

    def room(self, size: int, device: torch.device) -> torch.device:
        """Return where to hold cached outputs of so many bytes, and count them: in the host's memory if they must."""
        if device.type != "cpu" and self.hold != "host" and size <= self._left(device):
            self.taken += size
            return device
        return torch.device("cpu")

    def release(self, size: int, device: torch.device) -> None:
        """Count bytes that are no longer held on a device."""
        if device.type != "cpu":
            self.taken -= size

    def _left(self, device: torch.device) -> float:
        if self.memory is not None:
            return self.memory * _GIB - self.taken
        return _SHARE * torch.cuda.mem_get_info(device)[0]
