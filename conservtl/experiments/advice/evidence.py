"""The evidence for a recommendation: amount of data, distance of the domains, transferability of each layer."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from conservtl.data import Data, spread
from conservtl.errors import DataError, counted
from conservtl.experiments.advice.layer_features import LayerFeatures, features_of, statistics_shift
from conservtl.experiments.advice.transferability import FOLDS, cross_validated, leep, log_me, proxy_a_distance
from conservtl.experiments.run.setting import Setting
from conservtl.experiments.run.source_training import SourceModel
from conservtl.extras import require
from conservtl.layers import find_layers
from conservtl.report.text.html_table import Cell, HtmlTable, TableRow
from conservtl.runtime.freezing import keeps_batch_statistics
from conservtl.tasks.base import Shift

__all__ = ["Evidence", "gather"]

ENOUGH_FOR_DISTANCE = 20
"""Fewest target examples for the proxy A-distance: with 10, a linear classifier learned too little and gave 0 to 1.6
for speakers that give 0.8 to 1.7 with 50."""
MARGIN = 0.15
"""Nats an example below the best layer's LogME within which a layer's features are used too: side by side they were
better than the best alone on digits at every size; layers farther behind are those next to the input or the head."""
_MOST = 1000  # source examples that are measured
_C = 0.1  # of the SVM, as FeatureExtraction has it


@dataclass(frozen=True)
class Evidence:
    """The numbers behind a recommendation.

    Args:
        shift: labels: the target's labels are new; speaker: the same words by another speaker; input: the same labels
            for inputs that look different.
        classes: number of the target's classes.
        examples: number of shots of all classes.
        fewest: number of shots of the class that has fewest.
        most: number of shots of the class that has most.
        parameters: number of the model's parameters.
        layers: the body's layers, input side first.
        head: name of the layer that holds the classifier.
        epochs: the spec's epochs.
        steps: optimizer steps an epoch, by the spec's batch size.
        distance: proxy A-distance at the features that enter the head, 0 to 2; None: not measured.
        distances: layer -> proxy A-distance.
        statistics: shift of the norms' statistics, in the source's standard deviations; None: not measured.
        batch_norms: whether the model has norms that keep statistics.
        log_me: layer -> LogME of its features, nats an example.
        leep: LEEP of the source model's outputs, nats an example.
        entropy: entropy of the labels, nats: LEEP is its negative for outputs that are independent of the labels.
        best_layers: layers whose LogME is within the margin of the best.
        features_accuracy: accuracy of an SVM on their features, cross-validated on the shots; None if a class has a
            single example, or the head is the source's.
        left_out: measurements that could not be made, and why.
    """

    shift: Shift
    classes: int
    examples: int
    fewest: int
    most: int
    parameters: int
    layers: tuple[str, ...]
    head: str
    epochs: int
    steps: int
    distance: float | None
    distances: dict[str, float]
    statistics: float | None
    batch_norms: bool
    log_me: dict[str, float]
    leep: float
    entropy: float
    best_layers: tuple[str, ...]
    features_accuracy: float | None
    left_out: tuple[str, ...]

    @property
    def per_parameter(self) -> float:
        """Examples for each parameter."""
        return self.examples / self.parameters

    def table(self) -> HtmlTable:
        """Return LogME and the proxy A-distance of each layer's features."""
        rows = []
        for name in self.layers:
            away = Cell(f"{self.distances[name]:.2f}" if name in self.distances else "–")
            note = "near the best" if name in self.best_layers else ""
            rows.append(TableRow([Cell(name, note), Cell(f"{self.log_me[name]:.2f}"), away]))
        note = f"LEEP {self.leep:.2f}, of {-self.entropy:.2f} to 0."
        return HtmlTable("Features of the source model", note, ["layer", "LogME", "A-distance"], rows)


def gather(setting: Setting, source: SourceModel) -> Evidence:
    """Measure the source model on the shots and on the source's data; train nothing.

    Raises:
        DataError: the target has one class only.
        MissingExtraError: scikit-learn is not installed.
    """
    domains, spec = setting.domains, setting.spec
    if len(domains.labels) < 2:
        raise DataError(
            f"data: a recommendation needs two classes; there is one class only, {domains.labels[0]!r}. Add another."
        )
    plan = setting.adaptation(source.with_notes()).plan
    layers = find_layers(source.model, setting.example, spec.layers)
    target = _features(setting, source, domains.shots, layers)
    body = [name for name in target.layers if name != layers[-1].name] or list(target.layers)
    scores = {name: log_me(target.layers[name], target.labels) for name in body}
    best = max(scores.values())
    chosen = tuple(name for name in body if scores[name] >= best - MARGIN)
    counts = Counter(target.labels.tolist())
    shares = torch.tensor([count / len(target.labels) for count in counts.values()], dtype=torch.float64)
    left_out: list[str] = []
    distances = _distances(setting, source, target, layers, body, left_out)
    statistics = statistics_shift(source.model, domains.shots, forward=setting.task.forward)
    if statistics is None:
        left_out.append("shift of the norms' statistics: no norm of the model keeps any")
    accuracy = None
    if not setting.shared and min(counts.values()) > 1:
        accuracy = _held_out_accuracy(torch.cat([target.layers[name] for name in chosen], 1), target.labels)
    return Evidence(
        shift=setting.shift,
        classes=len(domains.labels),
        examples=len(target.labels),
        fewest=min(counts.values()),
        most=max(counts.values()),
        parameters=plan.totals()["all"],
        layers=tuple(body),
        head=layers[-1].name,
        epochs=spec.training.epochs,
        steps=math.ceil(len(target.labels) / spec.training.step_size),
        distance=distances.get(body[-1]),
        distances=distances,
        statistics=statistics,
        batch_norms=any(map(keeps_batch_statistics, source.model.modules())),
        log_me=scores,
        leep=leep(target.outputs.softmax(-1), target.labels),
        entropy=float(-(shares * shares.log()).sum()),
        best_layers=chosen,
        features_accuracy=accuracy,
        left_out=tuple(left_out),
    )


def _distances(
    setting: Setting, source: SourceModel, target: LayerFeatures, layers: Any, body: list[str], left_out: list[str]
) -> dict[str, float]:
    """Return the proxy A-distance of each layer's features, given source data and enough target data."""
    data, what = setting.domains.source_train, "proxy A-distance"
    if data is None:
        left_out.append(f"{what}: the spec gives no source data")
        return {}
    if len(target.labels) < ENOUGH_FOR_DISTANCE:
        left_out.append(
            f"{what}: {counted(len(target.labels), 'target example', 'is')} too few to separate domains "
            f"({ENOUGH_FOR_DISTANCE} are needed)"
        )
        return {}
    theirs = _features(setting, source, spread(data, _MOST), layers)
    return {name: proxy_a_distance(theirs.layers[name], target.layers[name]) for name in body}


def _features(setting: Setting, source: SourceModel, data: Data, layers: Any) -> LayerFeatures:
    return features_of(source.model, data, layers, forward=setting.task.forward, labels=setting.task.labels)


def _held_out_accuracy(features: Tensor, labels: Tensor) -> float:
    """Cross-validated accuracy of a linear SVM on the shots."""
    machine = require("sklearn.svm", "experiments").LinearSVC(C=_C, max_iter=10_000)
    folds = min(FOLDS, *Counter(labels.tolist()).values())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an SVM that has not fully converged measures as well
        found = cross_validated("cross_val_score", machine, features.double().numpy(), labels.numpy(), folds)
    return float(found.mean())
