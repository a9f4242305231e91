"""Weights that a run keeps: the best by validation sets, with early stopping, or an average over its steps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from conservtl.engine.criterion import check_metric, default_criterion, judged, score
from conservtl.engine.evaluation import Holdout
from conservtl.engine.training import Training
from conservtl.errors import SpecError
from conservtl.functions import Metrics, accuracy
from conservtl.kernels.dtensor import from_part, local, part_of, place_like
from conservtl.layers import named_parameters, unwrap
from conservtl.plan.plan import Plan

__all__ = ["Selection", "WeightAverage", "check_selection", "deciders", "decides"]


@dataclass
class Selection:
    """The best evaluation so far.

    Args:
        best: its score; None before the first evaluation with a score.
        loss: its loss, which decides between equal scores: few examples have few different accuracies.
        weights: the model's state dict then, on the CPU, of sharded tensors this process's parts; None unless the
            settings keep the best weights.
        stale: evaluations since the score was last beaten.
    """

    best: float | None = None
    loss: float = math.inf
    weights: dict[str, Tensor] | None = None
    stale: int = 0

    def look(
        self,
        evaluation: Mapping[str, Mapping[str, float]],
        model: nn.Module,
        training: Training,
        *,
        decides: bool = False,
    ) -> None:
        """Compare an evaluation with the best one, and copy the weights if they are to be kept.

        Metrics without an accuracy are passed over if the settings name no metric and nothing is decided.
        """
        sets = judged(evaluation, training.keep)
        metric = (training.select or default_criterion(evaluation, training.keep)).metric
        if training.select is None and not decides and any(metric not in evaluation[name] for name in sets):
            return
        value = score(evaluation, training.keep, training.select)
        loss = sum(evaluation[name]["loss"] for name in sets)
        better = self.best is None or value > self.best
        self.stale = 0 if better else self.stale + 1
        if not better and not (value == self.best and loss < self.loss):
            return
        self.best, self.loss = value, loss
        if training.keep in ("target", "harmonic"):
            tensors = unwrap(model).state_dict()
            self.weights = {name: part_of(tensor) for name, tensor in tensors.items()}


def decides(training: Training, plan: Plan) -> bool:
    """Return whether a validation score decides anything."""
    return bool(deciders(training, plan))


def deciders(training: Training, plan: Plan) -> list[str]:
    """Return the settings and strategies that decide by a validation score, as a message names them."""
    return [*_selecting(training), *_choosers(plan)]


def check_selection(training: Training, valid: Mapping[str, object], plan: Plan, metrics: Metrics) -> None:
    """Raise unless the validation sets and metrics that decide are there.

    Metrics are checked here if they are the default ones, else at the first evaluation.
    """
    missing = [name for name in ("target", "source")[: 2 if training.keep == "harmonic" else 1] if name not in valid]
    if missing and (selecting := _selecting(training)):
        verb, them = ("choose", "them") if len(selecting) > 1 else ("chooses", "it")
        fix = "Carve one from the shots (data.validation)" if missing[0] == "target" else "Pass source data"
        raise SpecError(
            f"{' and '.join(selecting)} {verb} by a validation set, but valid has no {missing[0]!r}. {fix}, or leave "
            f"{them} out."
        )
    for after in plan.after:
        if training.keep == "path" and after.interpolates:
            raise SpecError(f"training.keep=path and {after.by} both interpolate the weights. Leave one of them out.")
    choosing = _choosers(plan)
    if choosing and "target" not in valid:
        raise SpecError(
            f"{choosing[0]} chooses on a validation part, but there is none. Carve one from the shots "
            "(data.validation), or pass valid={'target': ...}."
        )
    select = training.select
    if select is None or "target" not in valid:
        return
    for name in judged(valid, training.keep):
        data = valid[name]
        if ((data.metrics if isinstance(data, Holdout) else None) or metrics) is accuracy:
            check_metric(select, ("loss", "accuracy"), name)


def _selecting(training: Training) -> list[str]:
    """Return the settings that keep weights, or stop, by a validation score."""
    keep = [] if training.keep == "last" else [f"training.keep={training.keep}"]
    return keep if training.patience is None else [*keep, f"training.patience={training.patience}"]


def _choosers(plan: Plan) -> list[str]:
    """Return the strategies that choose by a validation score."""
    return [after.by for after in plan.after if after.scored] + [search.by for search in plan.searches]


class WeightAverage:
    r"""The average of the weights and of the norms' statistics.

    .. math:: \bar w_0 = w_0, \qquad \bar w_k = d\,\bar w_{k-1} + (1 - d)\,w_k \text{ after step } k

    Args:
        model: the model that is trained, at its starting point, on its device.
        trained: names of the parameters that are trained in some phase; the others need no average.
        decay: d, at least 0 and less than 1.
    """

    def __init__(self, model: nn.Module, trained: frozenset[str], decay: float) -> None:
        parameters = {name: each for name, each in named_parameters(model).items() if name in trained}
        buffers = {name: each for name, each in unwrap(model).named_buffers() if each.is_floating_point()}
        self._live: dict[str, Tensor] = {**parameters, **buffers}
        self._average = {name: local(tensor.detach()).clone() for name, tensor in self._live.items()}
        self._lerp: Any = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights after a step."""
        self._lerp(list(self._average.values()), [local(tensor.detach()) for tensor in self._live.values()], None)

    @torch.no_grad()
    def apply(self) -> None:
        """Put the average into the model."""
        for name, tensor in self._live.items():
            local(tensor.detach()).copy_(self._average[name])

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Put the average into the model for a block."""
        weights = {name: local(tensor.detach()).clone() for name, tensor in self._live.items()}
        self.apply()
        try:
            yield
        finally:
            for name, tensor in self._live.items():
                local(tensor.detach()).copy_(weights[name])

    def state_dict(self) -> dict[str, Tensor]:
        """Return the average by name, sharded like the parameters."""
        return {name: from_part(tensor, self._live[name], tensor.dtype) for name, tensor in self._average.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore an average that ``state_dict`` returned."""
        for name, tensor in self._average.items():
            tensor.copy_(local(place_like(state[name], self._live[name], tensor.dtype)))
