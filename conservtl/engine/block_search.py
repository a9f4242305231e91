"""The best block to train alone, found by training each for a while."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from conservtl.adaptation.adaptation import Adaptation
from conservtl.engine.batching import Held, Streamed
from conservtl.engine.epoch import Augment
from conservtl.engine.evaluation import Functions
from conservtl.engine.randomness import generator_states, preserve_rng, restore_generators
from conservtl.engine.training import Training
from conservtl.errors import SpecError
from conservtl.functions import Forward, Loss, Metrics, accuracy, cross_entropy
from conservtl.functions import forward as plain_forward
from conservtl.methods.surgical_fine_tuning import FACT, BestBlock

__all__ = ["best_block"]

_SHARE = 5  # a trial takes so many times fewer epochs than the run, where nobody says


@dataclass(frozen=True)
class _Trial:
    """How each block is tried."""

    train: Any
    valid: Mapping[str, Any]
    training: Training
    functions: Functions
    augment: Augment | None
    accelerator: Any

    def score(self, adaptation: Adaptation, block: str) -> float:
        """The validation score of one block, trained on a copy."""
        from conservtl.engine.loop import fit  # which calls us

        own = copy.deepcopy(adaptation)
        own.replan(**{FACT: block})
        result = fit(
            own,
            self.train,
            self.valid,
            self.training,
            forward=self.functions.forward,
            loss=self.functions.loss,
            metrics=self.functions.metrics,
            augment=self.augment,
            accelerator=self.accelerator,
        )
        if result.best is None:
            raise RuntimeError("a trial ends with an evaluation")
        return result.best


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
    accelerator: Any = None,
) -> dict[str, float]:
    """Try each candidate block of ``SurgicalFineTuning(block="best")``, and draw the plan up with the best.

    Each is trained on a copy of the adaptation, from the same start, on the same batches in the same order; then
    scored on the validation part. The first of equals wins. ``fit`` does this by itself.

    Args:
        adaptation: its plan is drawn up again; its weights, and all random generators, are left as they are.
        train: as for ``fit``.
        valid: {"target": data}, or with "source" for a harmonic mean, as for ``fit``.
        training: the run's settings; a trial takes a fifth of its epochs, unless the strategy says how many.
        forward: as for ``fit``.
        loss: as for ``fit``.
        metrics: as for ``fit``.
        augment: as for ``fit``.
        accelerator: as for ``fit``.

    Returns:
        Block -> its score; nothing where no strategy asks for it.

    Raises:
        SpecError: there is no validation part.

    Reference:
        Lee et al. 2022, "Surgical fine-tuning improves adaptation to distribution shifts".
    """
    wanted = [one for one in adaptation.outstanding() if isinstance(one, BestBlock)]
    if not wanted:
        return {}
    if "target" not in valid:
        raise SpecError(f"{wanted[0].by} chooses on a validation part: pass valid={{'target': data}}.")
    settings = training or Training()
    epochs = wanted[0].epochs or max(1, settings.epochs // _SHARE)
    keep = "target" if settings.keep == "target" else "last"
    short = settings.model_copy(update={"epochs": epochs, "evaluate_every": epochs, "patience": None, "keep": keep})
    trial = _Trial(train, valid, short, Functions(forward, loss, metrics), augment, accelerator)
    own = train.generators if isinstance(train, Held | Streamed) else Streamed(train, torch.device("cpu")).generators
    scores = {}
    for block in wanted[0].candidates:
        drawn = generator_states(own)
        with preserve_rng():
            scores[block] = trial.score(adaptation, block)
        restore_generators(drawn, own)
    adaptation.replan(**{FACT: max(scores, key=lambda block: scores[block])})
    return scores
