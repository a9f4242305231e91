"""Classifiers fitted to features, as values of the model's head."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import conservtl as ctl
from conservtl.methods.feature_extraction.fitted_head import RowStore, _standardised, nearest_means

sklearn = pytest.importorskip("sklearn")

Y = torch.arange(60) % 3
X = torch.randn(60, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 2 * F.one_hot(Y, 4)


class Counting(nn.Module):
    """Counts the examples that pass, and drops out in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def forward(self, x):
        self.seen += len(x)
        return F.dropout(x, 0.5, self.training)


def network(classes=3, head=None):
    torch.manual_seed(0)
    body = (nn.Linear(4, 6), nn.BatchNorm1d(6), Counting(), nn.Tanh())
    return nn.Sequential(*body, head or nn.Linear(6, classes)).double()


def fitted(classifier, x=X, y=Y, model=None, **fields):
    model = model or network(int(y.max()) + 1)
    source = {name: tensor + 0.1 for name, tensor in model.state_dict().items()}
    adaptation = ctl.adapt(model, source, [ctl.FeatureExtraction(classifier=classifier, **fields)])
    facts = adaptation.finish([(x[:32], y[:32]), (x[32:], y[32:])])
    model.eval()
    return adaptation, facts["fitted_head"]


def features(model, x=X):
    return model[:-1](x).detach()


def scikit(classifier, c, x, y):
    """The same from scikit-learn's own parts."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import LinearSVC

    last = LinearSVC(C=c, random_state=0, max_iter=10_000) if classifier == "svm" else LogisticRegression(C=c)
    return make_pipeline(StandardScaler(), last.set_params(max_iter=10_000)).fit(x.numpy(), y.numpy())


@pytest.mark.parametrize("c", [0.01, 2.0])
@pytest.mark.parametrize("classifier", ["svm", "logistic"])
def test_the_head_scores_as_scikit_learn_decides(classifier, c):
    model, facts = fitted(classifier, C=c)
    expected = scikit(classifier, c, features(model.model), Y).decision_function(features(model.model).numpy())
    assert torch.allclose(model.model(X), torch.from_numpy(expected), atol=1e-6)
    assert facts == {"classifier": classifier, "examples": 60, "features": 6, "converged": True, "C": c}


@pytest.mark.parametrize("classifier", ["svm", "logistic"])
def test_two_classes_are_apart_by_the_margin(classifier):
    """scikit-learn gives one row for two classes, and a head has two."""
    y = (X[:, 3] > 0).long()
    model = fitted(classifier, y=y, C=0.3)[0].model
    expected = scikit(classifier, 0.3, features(model), y)
    scores = model(X).detach()
    margin = torch.from_numpy(expected.decision_function(features(model).numpy()))
    assert torch.allclose(scores[:, 1] - scores[:, 0], margin, atol=1e-6)
    if classifier == "logistic":
        assert torch.allclose(scores.softmax(1), torch.from_numpy(expected.predict_proba(features(model))), atol=1e-6)


def test_scores_of_class_means_are_distances():
    model = fitted("ncm")[0].model
    found, x = model(X), features(model)
    means = torch.stack([x[label == Y].mean(0) for label in range(3)])
    squares = torch.cdist(x, means).square()
    assert torch.equal(found.argmax(1), squares.argmin(1))
    assert torch.allclose(found[:, :1] - found, squares - squares[:, :1])


@pytest.mark.parametrize("classifier", ["svm", "ncm"])
def test_each_example_passes_once_and_nothing_else_changes(classifier):
    model = network()
    adaptation = ctl.adapt(model.train(), network().state_dict(), [ctl.FeatureExtraction(classifier=classifier)])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    model[2].seen = 0
    adaptation.finish([(X[:50], Y[:50]), (X[50:], Y[50:])])
    assert model[2].seen == 60
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"4.weight", "4.bias"}
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(state, torch.get_rng_state())
    assert not model[4]._forward_pre_hooks


def test_a_convolution_of_size_1_is_a_head_where_its_outputs_are_averaged():
    torch.manual_seed(0)
    parts = (nn.Conv2d(2, 5, 3), nn.ReLU(), nn.Conv2d(5, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    x = torch.randn(60, 2, 6, 6, dtype=torch.float64)
    model = fitted("ncm", x=x, model=nn.Sequential(*parts).double())[0].model
    pooled = model[:2](x).mean((2, 3))
    means = torch.stack([pooled[label == Y].mean(0) for label in range(3)])
    assert torch.allclose(model(x), 2 * pooled @ means.T - means.square().sum(1))


@pytest.mark.parametrize("behind", [nn.ReLU(), nn.Linear(3, 3).double().requires_grad_(False).eval().forward])
def test_a_head_whose_outputs_are_not_the_models_is_refused(behind):
    class Behind(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(4, 6)
            self.head = nn.Linear(6, 3)

        def forward(self, x):
            return behind(self.head(self.body(x)))

    with pytest.raises(ctl.SpecError, match="written into 'head', so the outputs of Behind must be that head's"):
        fitted("ncm", model=Behind().double())


def test_what_is_the_same_for_all_classes_may_follow_the_head():
    """As in a model that ends in a log softmax."""
    model = nn.Sequential(network(), nn.LogSoftmax(1))
    found = fitted("logistic", model=model)[0].model(X).exp()
    assert torch.allclose(found.sum(1), torch.ones(60, dtype=torch.float64))
    assert (found.argmax(1) == Y).float().mean() > 0.7


@pytest.mark.parametrize("head", [nn.Linear(6, 3, bias=False), nn.utils.parametrizations.weight_norm(nn.Linear(6, 3))])
def test_a_head_that_cannot_hold_it_is_refused_before_anything_is_done(head):
    with pytest.raises(ctl.SpecError, match=r"FeatureExtraction: classifier='svm' is written into the head"):
        fitted("svm", model=network(head=head))


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (Y.double(), r"needs one class for each example, integers of shape \(N,\); received torch.float64"),
        (F.one_hot(Y), r"received torch.int64 of shape \(32, 3\)"),
        (Y.where(Y < 2, 0), r"classes \[2\] of 3 have none"),
        (Y + 1, "labels from 0 to 2 as the head has outputs; received 1 to 3"),
        (Y - 1, "received -1 to 1"),
    ],
)
def test_labels_that_name_no_class_or_leave_one_out(y, message):
    with pytest.raises(ctl.DataError, match=message):
        fitted("logistic", y=y, model=network(3))


def test_data_is_needed():
    adaptation = ctl.adapt(network(), network().state_dict(), [ctl.FeatureExtraction(classifier="ncm")])
    with pytest.raises(ctl.SpecError, match=r"pass its batches, finish\(batches\)"):
        adaptation.finish()
    with pytest.raises(ctl.DataError, match="there are no batches"):
        adaptation.finish([])


def test_a_feature_that_never_changes_counts_for_nothing():
    """Its variance is 0 but for rounding, and must not be divided by."""
    x = torch.cat([X, torch.full((60, 1), 0.1, dtype=torch.float64)], 1).numpy()
    seen = {}

    def fit(standard):
        seen["x"] = standard.copy()
        return *nearest_means(standard, Y.numpy()), True

    weight, bias, _ = _standardised(x, fit)
    assert abs(seen["x"][:, -1]).max() < 1e-9
    assert abs(weight[:, -1]).max() < 1e-9
    assert abs(bias).max() < 1e3


def test_a_mapped_matrix_is_the_one_in_memory():
    held, mapped = RowStore(), RowStore(limit=900)
    blocks = [torch.randn(n, 5) for n in (7, 40, 3)]
    for block in blocks:
        held.add(block)
        mapped.add(block)
    one, other = held.matrix(), mapped.matrix()
    assert type(one) is not type(other)
    assert torch.equal(torch.from_numpy(one), torch.cat(blocks))
    assert torch.equal(torch.from_numpy(other[:]), torch.cat(blocks))
    other -= other.mean(0)  # it is fitted in place
    assert abs(other.mean()) < 1e-6


def test_half_precision_features_are_widened():
    rows = RowStore()
    rows.add(torch.ones(2, 3, dtype=torch.bfloat16))
    assert rows.matrix().dtype == "float32"


def test_features_beyond_the_limit_give_the_same_classifier(monkeypatch):
    inside = fitted("svm")[0].model(X)
    monkeypatch.setattr("conservtl.methods.feature_extraction.fitted_head.RowStore", lambda: RowStore(limit=0))
    monkeypatch.setattr("conservtl.methods.feature_extraction.fitted_head._BLOCK", 7)
    assert torch.allclose(fitted("svm")[0].model(X), inside, atol=1e-8)


def test_a_solver_that_stops_early_says_so(monkeypatch):
    monkeypatch.setattr("conservtl.methods.feature_extraction.fitted_head._STEPS", 1)
    assert not fitted("svm", C=100.0)[1]["converged"]
