"""The sets of a run: what may be selected on, what is only shown, and what both test parts say."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from conservtl.data import Data, spread
from conservtl.engine import Holdout
from conservtl.experiments.run.scoring import SourceView, outputs_of
from conservtl.experiments.run.setting import Setting
from conservtl.experiments.run.source_training import SourceModel
from conservtl.experiments.spec.spec import SpeechSpec, VisionSpec
from conservtl.plan.plan import Plan

__all__ = ["device_of", "outputs_on", "valid_sets", "wants_source", "watch_sets"]


def watch_sets(setting: Setting, source: SourceModel, most: int | None = None) -> dict[str, Any]:
    """The test parts, or at most so many examples of each, evenly spread: shown along the way, never selected on."""
    domains = setting.domains
    sets: dict[str, Any] = {"target": spread(domains.target_test, most)}
    if domains.source_test is not None:
        sets["source"] = _on_source(setting, source, spread(domains.source_test, most))
    return sets


def valid_sets(setting: Setting, source: SourceModel, *, both: bool) -> dict[str, Any] | None:
    """What may be selected on: carved from the shots, and the data that the source model was trained on.

    Args:
        setting: of the run.
        source: the source model.
        both: whether the source is looked at too, where it has data.
    """
    domains = setting.domains
    if domains.validation is None:
        return None
    sets: dict[str, Any] = {"target": domains.validation}
    if both and domains.source_train is not None:
        sets["source"] = _on_source(setting, source, domains.source_train)
    return sets


def wants_source(spec: SpeechSpec | VisionSpec, plan: Plan) -> bool:
    """Whether something is selected by the source too."""
    return spec.training.keep in ("harmonic", "path") or any(type(one).scored for one in plan.after)


def outputs_on(setting: Setting, source: SourceModel, model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Logits and labels on both test parts; where the labels differ, the source's under the source's own head."""
    domains = setting.domains
    device = next(model.parameters()).device
    model.eval()
    found = {"target": outputs_of(model, domains.target_test, device)}
    if domains.source_test is not None:
        if setting.shared:
            found["source"] = outputs_of(model, domains.source_test, device)
        else:
            view = SourceView(source.model, setting.head(source.model))
            found["source"] = outputs_of(lambda inputs: view(model, inputs), domains.source_test, device)
    return found


def device_of(device: str) -> str:
    """Where ``fit`` will train by this setting, so that what comes before and after happens there too."""
    return "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"


def _on_source(setting: Setting, source: SourceModel, data: Data) -> Any:
    if setting.shared:
        return data
    view = SourceView(source.model, setting.head(source.model))
    return Holdout(data, forward=lambda model, batch: view(model, batch[0]))
