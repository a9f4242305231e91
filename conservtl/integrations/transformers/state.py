"""The adaptation's state in a Trainer's checkpoints."""

from __future__ import annotations

from pathlib import Path

import torch

from conservtl.adaptation.adaptation import Adaptation
from conservtl.errors import SpecError

__all__ = ["load_adaptation", "save_adaptation"]

_FILE = "conservtl.pt"


def save_adaptation(adaptation: Adaptation, folder: str | Path, *, write: bool = True) -> None:
    """Save the adaptation's state in a checkpoint; all processes call it, and one writes."""
    state = adaptation.state_dict()
    if write:
        torch.save(state, Path(folder) / _FILE)


def load_adaptation(adaptation: Adaptation, folder: str | Path) -> None:
    """Restore the adaptation's state from a checkpoint.

    Raises:
        SpecError: the checkpoint has none.
        PlanError: it belongs to another plan.
    """
    file = Path(folder) / _FILE
    if not file.is_file():
        raise SpecError(
            f"{folder} must hold the adaptation's state to go on from, {_FILE}, and does not. Resume from a checkpoint "
            "that a ConservingTrainer or a ConservingCallback saved without save_only_model."
        )
    adaptation.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
