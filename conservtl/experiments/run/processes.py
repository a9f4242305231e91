"""The process that writes and prints, where several of them (``torchrun``) train one model."""

from __future__ import annotations

import os

import torch

__all__ = ["is_main_process"]


def is_main_process() -> bool:
    """Return whether this is the only process, or the first: before they are connected, the launcher says it."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank() == 0
    return int(os.environ.get("RANK", "0")) == 0
