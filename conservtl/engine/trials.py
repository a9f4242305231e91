"""The searches of a plan in a training loop without ``fit``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from conservtl.adaptation.adaptation import Adaptation
from conservtl.engine.batch import Batches
from conservtl.engine.epoch import Augment
from conservtl.engine.evaluation import Functions
from conservtl.engine.loop import trial_of
from conservtl.engine.preparation import check_arguments
from conservtl.engine.proxies import check_proxies
from conservtl.engine.search import run_searches
from conservtl.engine.streamed import Streamed
from conservtl.engine.training import Training
from conservtl.functions import Forward, Loss, Metrics, accuracy, cross_entropy
from conservtl.functions import forward as plain_forward

__all__ = ["best_block"]


def best_block(
    adaptation: Adaptation,
    train: Any,
    valid: Mapping[str, Any],
    training: Training | None = None,
    *,
    forward: Forward = plain_forward,
    loss: Loss = cross_entropy,
    metrics: Metrics = accuracy,
    augment: Augment | None = None,
    proxies: Augment | None = None,
    accelerator: Any = None,
    optimizer: Any = None,
) -> dict[str, float]:
    """Carry out the searches of a plan, such as the one of ``SurgicalFineTuning(block="best")``.

    Each candidate is trained on a copy of the adaptation, from the same start, on the same batches in the same order;
    then scored on the validation part. The plan is drawn up again with the best, the first of equals, or with what
    the search decides. ``fit`` does this by itself.

    Args:
        adaptation: its plan is drawn up again; its weights and all random generators are restored.
        train: as for ``fit``.
        valid: {"target": data}, or with "source" for a harmonic mean, as for ``fit``.
        training: the run's settings; a trial takes a fifth of its epochs, unless the strategy says how many.
        forward: as for ``fit``.
        loss: as for ``fit``.
        metrics: as for ``fit``.
        augment: as for ``fit``.
        proxies: as for ``fit``.
        accelerator: as for ``fit``.
        optimizer: as for ``fit``.

    Returns:
        Candidate -> its score, for the candidates of all searches; empty if no strategy searches.

    Raises:
        SpecError: there is no validation part.

    Reference:
        Lee et al. 2022, "Surgical fine-tuning improves adaptation to distribution shifts".
    """
    settings = training or Training()
    check_proxies(proxies)
    check_arguments(adaptation, settings, {"valid": valid}, accelerator=accelerator)
    generators = train.generators if isinstance(train, Batches) else Streamed(train, torch.device("cpu")).generators
    trial = trial_of(train, valid, Functions(forward, loss, metrics), augment, accelerator, optimizer, proxies)
    results = run_searches(adaptation, valid, settings, generators, trial)
    return {candidate: score for scores in results.values() for candidate, score in scores.items()}
