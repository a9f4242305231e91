"""The scores are their papers' formulas, and say what their limits must say."""

import math

import pytest
import torch

import conservtl as ctl
from conservtl.experiments.advice.transferability import leep, log_me, proxy_a_distance


def drawn(n, width, classes=3, apart=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    centres = apart * torch.randn(classes, width, generator=generator, dtype=torch.float64)
    return centres[labels] + torch.randn(n, width, generator=generator, dtype=torch.float64), labels


@pytest.mark.parametrize(("n", "width"), [(60, 5), (12, 30)])
def test_log_me_is_the_largest_log_evidence(n, width):
    """Against the Gaussian's own log density, N(y | 0, I/beta + F F'/alpha), searched over a grid and refined."""
    features, labels = drawn(n, width)
    found = []
    for label in range(3):
        y = (labels == label).double()
        logs = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([logs], max_iter=500, line_search_fn="strong_wolfe", tolerance_change=1e-14)

        def negative(y=y, logs=logs, optimizer=optimizer):
            optimizer.zero_grad()
            alpha, beta = logs.exp()
            covariance = torch.eye(n, dtype=torch.float64) / beta + features @ features.T / alpha
            normal = torch.distributions.MultivariateNormal(torch.zeros(n, dtype=torch.float64), covariance)
            loss = -normal.log_prob(y)
            loss.backward()
            return loss

        optimizer.step(negative)
        found.append(-negative().item() / n)
    assert log_me(features, labels) == pytest.approx(sum(found) / 3, abs=1e-4)


def test_leep_of_outputs_that_say_nothing_is_the_negative_entropy_and_of_perfect_ones_zero():
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    shares = torch.tensor([3, 2, 1]) / 6
    assert leep(torch.full((6, 4), 0.25), labels) == pytest.approx(float((shares * shares.log()).sum()))
    assert leep(torch.eye(3)[labels], labels) == pytest.approx(0)


def test_leep_is_its_formula():
    generator = torch.Generator().manual_seed(0)
    theta = torch.rand(9, 4, generator=generator, dtype=torch.float64)
    theta /= theta.sum(1, keepdim=True)
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0, 0, 1])
    total = 0.0
    for i in range(9):
        likelihood = 0.0
        for z in range(4):
            same = sum(float(theta[j, z]) for j in range(9) if labels[j] == labels[i])
            likelihood += same / float(theta[:, z].sum()) * float(theta[i, z])
        total += math.log(likelihood)
    assert leep(theta, labels) == pytest.approx(total / 9)


def test_features_that_separate_the_classes_score_more():
    """Also with fewer samples than dimensions, where a plain covariance has no inverse."""
    for n, width in ((60, 5), (12, 40)):
        good, labels = drawn(n, width, apart=3.0)
        noise, _ = drawn(n, width, apart=0.0, seed=1)
        assert math.isfinite(log_me(good, labels))
        assert log_me(good, labels) > log_me(noise, labels)


@pytest.mark.parametrize("score", [log_me, lambda features, labels: leep(features.softmax(-1), labels)])
def test_names_of_classes_and_the_order_of_examples_do_not_matter(score):
    features, labels = drawn(30, 4)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    renamed = torch.tensor([7, -2, 40])[labels]
    assert score(features, renamed) == pytest.approx(score(features, labels), rel=1e-6)
    assert score(features[order], labels[order]) == pytest.approx(score(features, labels), rel=1e-6)


@pytest.mark.parametrize("score", [log_me, lambda features, labels: leep(features.softmax(-1), labels)])
def test_bad_input_is_named(score):
    features, labels = drawn(12, 4)
    with pytest.raises(ctl.DataError, match="two classes"):
        score(features, torch.zeros_like(labels))
    with pytest.raises(ctl.DataError, match=r"\(n, D\)"):
        score(features, labels[:-1])
    with pytest.raises(ctl.DataError, match="finite"):
        score(features.index_fill(0, torch.tensor([3]), torch.nan), labels)


def test_leep_takes_probabilities_only():
    features, labels = drawn(12, 4)
    with pytest.raises(ctl.DataError, match="softmax"):
        leep(features, labels)


def test_a_distance_is_near_0_for_one_distribution_and_2_for_two_apart():
    """And neither depends on how much larger one domain is: chance is chance for 20 examples beside 400."""
    pytest.importorskip("sklearn")
    generator = torch.Generator().manual_seed(0)
    many, few = torch.randn(400, 5, generator=generator), torch.randn(20, 5, generator=generator)
    assert proxy_a_distance(many, few) < 0.5
    assert proxy_a_distance(many, few + 9) == 2
    assert 0.3 < proxy_a_distance(many, torch.randn(400, 5, generator=generator) + 0.4) < 1.5


def test_a_distance_names_bad_input():
    with pytest.raises(ctl.DataError, match="same layer"):
        proxy_a_distance(torch.zeros(4, 3), torch.zeros(4, 2))
    with pytest.raises(ctl.DataError, match="two examples"):
        proxy_a_distance(torch.zeros(4, 3), torch.zeros(1, 3))
    with pytest.raises(ctl.DataError, match="finite"):
        proxy_a_distance(torch.zeros(4, 3), torch.full((4, 3), torch.nan))
