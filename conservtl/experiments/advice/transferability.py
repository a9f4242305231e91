"""Transferability of features to a target, and distance of two domains: scores that need no training."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from conservtl.errors import DataError
from conservtl.extras import require

__all__ = ["FOLDS", "cross_validated", "leep", "log_me", "proxy_a_distance"]

_ROUNDS = 200  # of the fixed point; it moves less than the tolerance long before
_TOLERANCE = 1e-9  # nats an example
FOLDS = 5
"""Most folds of a cross-validation."""
_LEAST = 1e-12  # share of a label's energy below which features are said to explain it without rest


def log_me(features: Tensor, labels: Tensor) -> float:
    r"""Return LogME: the largest log evidence, per example, of a linear model of the labels on these features.

    .. math:: \frac{1}{K n} \sum_k \max_{\alpha, \beta} \log \int
              \mathcal{N}(y_k \mid F w, \beta^{-1} I)\, \mathcal{N}(w \mid 0, \alpha^{-1} I)\, dw

    with y_k 1 for label k and 0 otherwise. alpha and beta are found by the fixed point of evidence maximisation, on
    the singular values of F: O(n D min(n, D)) once for all classes. Weights are integrated out, so more dimensions
    than examples do no harm. Higher is better. It compares features of the same examples, such as those of several
    layers; values for different data are not comparable.

    Args:
        features: (n, D), not centred; a common shift is part of the model only if the features span it.
        labels: (n,) integers.

    Returns:
        Nats an example; the mean over the classes that occur.

    Raises:
        DataError: fewer than two classes, shapes that do not fit, or features that are not finite.

    Reference:
        You, Liu, Wang and Long 2021, "LogME: Practical assessment of pre-trained models for transfer learning",
        section 4.
    """
    f, classes = _checked(features, labels, "log_me")
    n, width = f.shape
    u, s, _ = torch.linalg.svd(f, full_matrices=False)
    y = torch.nn.functional.one_hot(classes).to(f)
    # (K, r) and (K, 1): all classes at once.
    squares = (u.mT @ y).square().mT
    rest = (y.square().sum(0)[:, None] - squares.sum(1, keepdim=True)).clamp_min(0)
    sigma = s.square()[None]
    floor = _LEAST * y.square().sum(0)[:, None]
    alpha = beta = torch.ones_like(rest)
    evidence = torch.full_like(rest, -torch.inf)
    for _ in range(_ROUNDS):
        a = alpha + beta * sigma
        weights = (beta.square() * sigma * squares / a.square()).sum(1, keepdim=True)
        error = ((alpha / a).square() * squares).sum(1, keepdim=True) + rest
        logdet = a.log().sum(1, keepdim=True) + (width - sigma.shape[1]) * alpha.log()
        fit = n * (beta.log() - math.log(2 * math.pi)) - beta * error
        now = (fit + width * alpha.log() - alpha * weights - logdet) / (2 * n)
        if (now - evidence).abs().max() < _TOLERANCE:
            break
        evidence = now
        gamma = (beta * sigma / a).sum(1, keepdim=True)
        alpha = (gamma / weights.clamp_min(torch.finfo(f.dtype).tiny)).clamp(1e-12, 1e12)
        beta = ((n - gamma) / error.clamp_min(floor)).clamp(1e-12, 1e12)
    return float(now.mean())


def leep(source_probabilities: Tensor, labels: Tensor) -> float:
    r"""Return LEEP: how well the source model's outputs, unchanged, predict the target's labels.

    .. math:: \frac{1}{n} \sum_i \log \sum_z \hat P(y_i \mid z)\, \theta(x_i)_z, \qquad
              \hat P(y, z) = \frac{1}{n} \sum_{i : y_i = y} \theta(x_i)_z

    with theta(x) the source model's probabilities: the mean log-likelihood of a classifier that first draws a source
    label and then a target label given it. The maximum is 0; outputs independent of the labels give minus the labels'
    entropy.

    Args:
        source_probabilities: (n, Z), each row summing to 1.
        labels: (n,) integers.

    Returns:
        Nats an example.

    Raises:
        DataError: fewer than two classes, shapes that do not fit, or rows that are no probabilities.

    Reference:
        Nguyen, Hassner, Seeger and Archambeau 2020, "LEEP: A new measure to evaluate transferability of learned
        representations", section 3.
    """
    theta, classes = _checked(source_probabilities, labels, "leep")
    if (theta < 0).any() or not torch.allclose(theta.sum(1), torch.ones_like(theta[:, 0]), atol=1e-4):
        raise DataError("leep: the rows of source_probabilities must be probabilities. Pass outputs.softmax(-1).")
    y = torch.nn.functional.one_hot(classes).to(theta)
    joint = y.mT @ theta  # n times it: the factor cancels
    given = joint / joint.sum(0).clamp_min(torch.finfo(theta.dtype).tiny)
    likelihood = (theta @ given.mT).gather(1, classes[:, None])
    return float(likelihood.log().mean())


def proxy_a_distance(source_features: Tensor, target_features: Tensor) -> float:
    r"""Return the proxy A-distance: how well a linear classifier separates two domains.

    .. math:: 2 (1 - 2 \epsilon)

    with epsilon the error of logistic regression on held-out examples, by cross-validation in at most five folds: the
    mean of the two domains' errors, since the domains may differ in size. 0: the domains cannot be separated; 2: they
    always can. Features are standardised.

    Args:
        source_features: (n, D).
        target_features: (m, D).

    Returns:
        0 to 2.

    Raises:
        DataError: fewer than two examples of a domain, features of different widths or not finite.
        MissingExtraError: scikit-learn is not installed.

    Reference:
        Ben-David, Blitzer, Crammer and Pereira 2007, "Analysis of representations for domain adaptation", section 4.
    """
    if source_features.ndim != 2 or target_features.ndim != 2 or source_features.shape[1] != target_features.shape[1]:
        raise DataError(
            "proxy_a_distance: both must be (examples, D) with one D; received "
            f"{tuple(source_features.shape)} and {tuple(target_features.shape)}. Take them from the same layer."
        )
    fewest = min(len(source_features), len(target_features))
    if fewest < 2:
        raise DataError(f"proxy_a_distance: a domain needs two examples; received {fewest}. Give more.")
    both = torch.cat([source_features, target_features.to(source_features.device)]).double().cpu()
    if not both.isfinite().all():
        raise DataError("proxy_a_distance: the features must be finite. Check the model's outputs.")
    domain = torch.cat([torch.zeros(len(source_features)), torch.ones(len(target_features))]).long().numpy()
    linear = require("sklearn.linear_model", "experiments").LogisticRegression(class_weight="balanced", max_iter=1000)
    guessed = cross_validated("cross_val_predict", linear, both.numpy(), domain, min(FOLDS, fewest))
    error = sum(float((guessed[domain == which] != which).mean()) for which in (0, 1)) / 2
    return min(2.0, max(0.0, 2 * (1 - 2 * error)))


def cross_validated(function: str, classifier: Any, features: Any, classes: Any, folds: int) -> Any:
    """Return the result of a function of scikit-learn's ``model_selection``, for a classifier of scaled features."""
    selection = require("sklearn.model_selection", "experiments")
    scaler = require("sklearn.preprocessing", "experiments").StandardScaler()
    chain = require("sklearn.pipeline", "experiments").make_pipeline(scaler, classifier)
    splits = selection.StratifiedKFold(folds, shuffle=True, random_state=0)
    return getattr(selection, function)(chain, features, classes, cv=splits)


def _checked(features: Tensor, labels: Tensor, what: str) -> tuple[Tensor, Tensor]:
    """Return features in double precision, and labels as positions among the values that occur."""
    if features.ndim != 2 or labels.shape != features.shape[:1]:
        raise DataError(
            f"{what}: features must be (n, D) and labels (n,); received {tuple(features.shape)} and "
            f"{tuple(labels.shape)}. Pool each example's features into one row."
        )
    if not features.isfinite().all():
        raise DataError(f"{what}: the features must be finite. Check the model's outputs.")
    found, classes = labels.to(features.device).unique(return_inverse=True)  # type: ignore[no-untyped-call]
    if len(found) < 2:
        raise DataError(f"{what}: labels must hold two classes; received {len(found)}. Give examples of another.")
    return features.detach().double(), classes
