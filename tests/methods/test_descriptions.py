"""Lines by which a plan says what strategies do, with the defaults that they fill in."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import conservtl as ctl
from conservtl.methods._rows import names_something
from conservtl.methods.fisher_sp import FisherMeasure


def network():
    return nn.Sequential(
        nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, 3)
    )


WAY = "from the start to the trained weights"
SAID = [
    (ctl.AutoRGN(), "learning rate × relative gradient norm of each layer, decided every 10 steps"),
    (ctl.AutoRGN(every=1), "learning rate × relative gradient norm of each layer, decided each step"),
    (ctl.EntropyMinimisation(), "1 × (0.3 × entropy + 0.7 × class confusion) at temperature 2.5"),
    (
        ctl.EntropyMinimisation(blank=0, entropy=0.25, temperature=1.0, weight=0.5),
        "0.5 × (0.25 × entropy without class 0 + 0.75 × class confusion) at temperature 1",
    ),
    (ctl.FeatureConservation(), "0.01 × distance of feature maps to the source's at 0"),
    (ctl.FeatureConservation(metric="ldifs"), "0.3 × distance of normalised features to the source's at 0"),
    (
        ctl.FeatureConservation(attention=True),
        "0.01 × distance of feature maps to the source's at 0, channels weighted by attention",
        "rise of the loss with each channel zeroed, at 0, on target data",
    ),
    (
        ctl.FeatureExtraction(classifier="svm"),
        "5 becomes a linear SVM (C = 0.03), fitted to the features of the training data",
    ),
    (
        ctl.FeatureExtraction(classifier="logistic"),
        "5 becomes a logistic regression (C = 0.1), fitted to the features of the training data",
    ),
    (
        ctl.FeatureExtraction(classifier="ncm"),
        "5 becomes the nearest class mean, fitted to the features of the training data",
    ),
    (
        ctl.FisherSP(every=3, data="source", fisher="true"),
        "pull of 2 parameters to the source, weighed by fisher, every 3 steps",
        "true Fisher information of 2 parameters on source data, example by example",
    ),
    (ctl.GroupLassoSP(), "soft threshold of each output channel of w - w0 by rate × 0.1, 2 parameters"),
    (ctl.L1SP(), "soft threshold of w - w0 by rate × 0.1, 2 parameters"),
    (ctl.L2SP(), "pull of 2 parameters to the source"),
    (ctl.L2SP(every=2), "pull of 2 parameters to the source, every 2 steps"),
    (ctl.Mixout(), "0.7 of the elements of 2 parameters at source values, drawn for each step"),
    (
        ctl.NormAdaptation(),
        "statistics of the norms on the target, mixed with the source's at the weight of 16 examples",
    ),
    (
        ctl.NormAdaptation(prior=1),
        "statistics of the norms on the target, mixed with the source's at the weight of 1 example",
    ),
    (ctl.NormAdaptation(statistics="target"), "statistics of the norms on the target"),
    (ctl.NormAdaptation(statistics="instance"), "statistics 83% as kept, 17% of each example, in batch norms"),
    (
        ctl.OutputConservation(),
        (
            "0.9 × task + 0.1 × cross-entropy at temperature 1 or squared distance to the source's outputs, "
            "as the task's loss takes them"
        ),
    ),
    (
        ctl.OutputConservation(weight=0.05, form="softmax"),
        "0.05 × KL divergence of each class to the source's outputs at temperature 2",
    ),
    (ctl.OutputConservation(rho=0.2, form="squared"), "0.8 × task + 0.2 × squared distance to the source's outputs"),
    (ctl.Projection(), "2 parameters held within 0.03 × |w0| of the source, for each tensor (frobenius norm)"),
    (
        ctl.Projection(relative=False, by="row", norm="mars"),
        "2 parameters held within 0.03 of the source, for each row (mars norm)",
    ),
    (ctl.Projection(radius="learn"), "2 parameters projected to radii learned on validation, 100 steps"),
    (ctl.Projection(radius="learn", steps=1), "2 parameters projected to radii learned on validation, 1 step"),
    (ctl.SelectiveDecay(), "decay of 2 parameters by 2 if going further raises the loss"),
    (
        ctl.SpectralShrinkage(k=2, layer="0"),
        "0.001 × the 2 smallest squared singular values of a batch's features at 0",
    ),
    (
        ctl.SurgicalFineTuning(block="best"),
        "each of 2 blocks trained alone for a fifth of the epochs; the best on validation is chosen",
    ),
    (
        ctl.SurgicalFineTuning(block="best", trial_epochs=1),
        "each of 2 blocks trained alone for 1 epoch; the best on validation is chosen",
    ),
    (
        ctl.WeightInterpolation(),
        f"weights at 0.7 of the way {WAY} (statistics: interpolate)",
    ),
    (
        ctl.WeightInterpolation(t=None, batch_norm="source"),
        f"weights at the best of 11 points {WAY}, by the validation part (statistics: source)",
    ),
]


@pytest.mark.parametrize(("strategy", "said"), [(first, rest) for first, *rest in SAID], ids=lambda one: str(one)[:40])
def test_what_the_plan_says(strategy, said):
    plan = ctl.adapt(network(), network(), [strategy], example=torch.zeros(2, 2, 5)).plan
    assert [one.describe() for one in plan.decisions] == said


def test_the_rate_of_radii():
    learned = ctl.adapt(network(), network(), [ctl.Projection(radius="learn")]).plan.after[0]
    assert (learned.rate, learned.steps) == (0.02, 100)


@pytest.mark.parametrize(
    ("classes", "draws", "shares"),
    [(3, None, [1 / 3] * 3), (32, None, [1 / 32] * 32), (33, None, [1 / 8] * 8), (3, 2, [1 / 2] * 2)],
)
def test_up_to_32_classes_are_summed_over_and_more_are_drawn_8_times(classes, draws, shares):
    measure = FisherMeasure(by="FisherSP", names=(), fisher="true", draws=draws)
    probe = SimpleNamespace(model=None, forward=lambda _, batch: torch.zeros(len(batch), classes))
    found = list(measure._labels(probe, torch.zeros(2, 1)))
    assert [weights.tolist() for _, weights in found] == [pytest.approx([share] * 2) for share in shares]
    assert {int(label) for labels, _ in found for label in labels} <= set(range(classes))


@pytest.mark.parametrize(("glob", "names"), [("*", False), ("*.*", False), ("?", False), ("", False), ("a*", True)])
def test_globs_that_mean_everything_name_nothing(glob, names):
    assert names_something(glob) == names
