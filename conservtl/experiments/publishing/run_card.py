"""The card of a run's model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conservtl.adaptation.adaptation import Adaptation
from conservtl.errors import SpecError
from conservtl.experiments.publishing.card import Card, card_text
from conservtl.experiments.publishing.licence import UNKNOWN, base_model, front_matter, licence_of
from conservtl.experiments.run.setting import Setting
from conservtl.report import left_out_notes, sentence

__all__ = ["CARD", "check_card", "run_card"]

CARD = "README.md"
"""Name of a model's card."""

_LOADING = """\
import conservtl as ctl

adapted = ctl.load_adapted(".")  # the folder of this file
print(adapted.predict(["{example}"]))

# the weights alone, for another program:
from safetensors.torch import load_file

weights = load_file("model.safetensors")"""


def check_card(folder: Path) -> None:
    """Raise if a README.md stands in an output folder that is no card of a run."""
    card = folder / CARD
    tags = front_matter(card).get("tags")
    if card.exists() and not (isinstance(tags, list) and "conservtl" in tags):
        raise SpecError(f"out: {str(card)!r} is no card that a run wrote, and a run replaces it. Give another folder.")


def run_card(setting: Setting, adaptation: Adaptation, report: Mapping[str, Any]) -> str:
    """Return the card of the model that a run adapted."""
    section = setting.spec.source
    weights = section.weights
    return card_text(
        Card(
            title=f"{setting.task.name} adapted to {setting.target}",
            plan=adaptation.plan,
            strategies=[strategy.label for strategy in adaptation.origin.strategies],
            drift=adaptation.drift(),
            labels=setting.domains.labels,
            source=section.shown if weights is not None else "a model trained on the source data",
            base=base_model(str(weights)) if isinstance(weights, str) else None,
            licence=UNKNOWN if weights is None else licence_of(weights),
            pipeline=setting.task.pipeline,
            library="conservtl",
            loading=_LOADING.format(example=setting.task.example),
            report=report,
            notes=[sentence(report), *left_out_notes(report)],
        )
    )
