"""Adaptation of norms: exact statistics of the target, and what is left to train."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import conservtl as ctl
from conservtl.methods.norm_adaptation.norm_statistics import _Moments
from conservtl.runtime.freezing import tracks_statistics


def network(norm=nn.BatchNorm2d, classes=3):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        norm(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1),
        norm(4),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, classes),
    ).double()


def source(norm=nn.BatchNorm2d):
    """A model whose norms have seen other data."""
    model = network(norm)
    torch.manual_seed(1)
    for _ in range(5):
        model(torch.randn(16, 2, 5, 5, dtype=torch.float64))
    return model.eval()


X = 3 * torch.randn(30, 2, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) + 1
Y = torch.arange(30) % 3


def batches(size):
    return list(zip(X.split(size), Y.split(size), strict=True))


@torch.no_grad()
def layer_by_layer(model, x, prior):
    """The obvious code: every norm in its turn, behind those that are done; all data in one batch."""
    model = copy.deepcopy(model).eval()
    for place, norm in enumerate(model):
        if not tracks_statistics(norm):
            continue
        seen = model[:place](x)
        share = len(x) / (len(x) + prior)
        mean, var = seen.mean((0, 2, 3)), seen.var((0, 2, 3))
        norm.running_mean.copy_((1 - share) * norm.running_mean + share * mean)
        norm.running_var.copy_((1 - share) * norm.running_var + share * var)
    return model


def adapted(strategy, size=7, **options):
    adaptation = ctl.adapt(network(), source(), [strategy], **options)
    adaptation.measure(batches(size))
    return adaptation


@pytest.mark.parametrize("size", [30, 7, 1])
@pytest.mark.parametrize(("statistics", "prior"), [("target", 0), ("mixed", 10)])
@torch.no_grad()
def test_statistics_are_those_of_all_data_norm_behind_norm_whatever_the_batches(size, statistics, prior):
    model = adapted(ctl.NormAdaptation(statistics=statistics, prior=prior), size).model
    expected = layer_by_layer(source(), X, prior)
    for name, buffer in expected.named_buffers():
        assert torch.allclose(model.state_dict()[name].double(), buffer.double(), rtol=1e-5, atol=1e-5), name


@torch.no_grad()
def test_the_order_of_the_data_does_not_matter():
    """Averages over batch statistics would depend on it: data often comes sorted by label."""
    shuffled = X[torch.randperm(30, generator=torch.Generator().manual_seed(3))]
    adaptation = ctl.adapt(network(), source(), [ctl.NormAdaptation()])
    adaptation.measure([(x,) for x in shuffled.split(4)])
    expected = adapted(ctl.NormAdaptation()).model
    for a, b in zip(adaptation.model.buffers(), expected.buffers(), strict=True):
        assert torch.allclose(a.double(), b.double(), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_instance_norms_keep_what_torch_would():
    model = network(lambda channels: nn.InstanceNorm2d(channels, affine=True, track_running_stats=True))
    first = copy.deepcopy(model[:2]).train()
    first[1].momentum = 1.0
    first(X)
    adaptation = ctl.adapt(model, copy.deepcopy(model), [ctl.NormAdaptation(statistics="target")])
    adaptation.measure(batches(7))
    assert torch.allclose(model[1].running_mean, first[1].running_mean)
    assert torch.allclose(model[1].running_var, first[1].running_var)


@torch.no_grad()
def test_moments_of_instances_without_their_padding():
    """The average of each example's own, over its positions alone."""
    x = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)).double()
    mask = torch.tensor([[True] * 5, [True, True, True, False, False]])
    moments = _Moments(instances=True)
    moments.take(x, mask)
    parts = [x[0], x[1, :, :3]]
    assert torch.allclose(moments.mean, sum(part.mean(1) for part in parts) / 2)
    assert torch.allclose(moments.variance, sum(part.var(1) for part in parts) / 2)


@torch.no_grad()
def test_a_norm_used_twice_has_the_moments_of_both_uses_and_an_unused_one_keeps_its_own():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.other, self.head = nn.BatchNorm2d(2), nn.BatchNorm2d(2), nn.Linear(2, 3)

        def forward(self, x):
            return self.head((self.norm(x) + self.norm(2 * x)).mean((2, 3)))

    model = Twice().double()
    adaptation = ctl.adapt(model, copy.deepcopy(model), [ctl.NormAdaptation(statistics="target")])
    adaptation.measure(batches(7))
    both = torch.cat([X, 2 * X])
    assert torch.allclose(model.norm.running_mean, both.mean((0, 2, 3)))
    assert torch.allclose(model.norm.running_var, both.var((0, 2, 3)))
    assert torch.equal(model.other.running_var, torch.ones(2).double())


def test_measuring_leaves_modes_and_weights_and_the_random_state_alone():
    adaptation = ctl.adapt(network(), source(), [ctl.NormAdaptation()])
    adaptation.model.train()
    before, state = copy.deepcopy(adaptation.model.state_dict()), torch.get_rng_state()
    adaptation.measure(batches(7))
    assert torch.equal(state, torch.get_rng_state())
    assert adaptation.model[6].training
    for name, tensor in adaptation.model.state_dict().items():
        assert torch.equal(tensor, before[name]) != name.endswith(("running_mean", "running_var")), name


def test_only_scales_and_shifts_are_trained_and_statistics_stand_still_through_train():
    adaptation = adapted(ctl.NormAdaptation())
    assert set(adaptation.plan.trained) == {"1.weight", "1.bias", "4.weight", "4.bias"}
    optimizer = adaptation.optimizer(torch.optim.AdamW, lr=0.1)
    before = copy.deepcopy(adaptation.model.state_dict())
    adaptation.model.train()
    nn.functional.cross_entropy(adaptation.model(X), Y).backward()
    optimizer.step()
    moved = {name for name, tensor in adaptation.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == set(adaptation.plan.trained)


def test_the_head_is_trained_on_request_and_always_where_it_is_fresh():
    head = {"9.weight", "9.bias"}
    plans = [
        ctl.adapt(network(), source(), [ctl.NormAdaptation(train="nothing", head=True)]).plan,
        ctl.adapt(network(classes=5), source(), [ctl.NormAdaptation(train="nothing")]).plan,
    ]
    for plan in plans:
        assert set(plan.trained) == head
    assert len(ctl.adapt(network(), source(), [ctl.NormAdaptation(train="all")]).plan.trained) == 10


def test_a_fresh_norm_follows_its_batches():
    """It has no statistics worth holding: those measured at random weights are of no use once they are trained."""
    strategies = [ctl.NormAdaptation(train="all"), ctl.LayerTransfer(layers=1, rest="fresh", freeze=False)]
    adaptation = ctl.adapt(network(), source(), strategies)
    adaptation.model.train()
    assert [adaptation.model[1].training, adaptation.model[4].training] == [False, True]


def test_a_norm_without_parameters_stands_still_too():
    build = lambda: network(lambda channels: nn.BatchNorm2d(channels, affine=False))  # noqa: E731
    adaptation = ctl.adapt(build(), build(), [ctl.NormAdaptation(train="all", statistics="target")])
    adaptation.measure(batches(7))
    before = adaptation.model[1].running_mean.clone()
    adaptation.model.train()(X)
    assert torch.equal(adaptation.model[1].running_mean, before)


def test_layer_norms_have_no_statistics_but_can_be_trained():
    def build():
        return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.ReLU(), nn.Linear(4, 2))

    plan = ctl.adapt(build(), build(), [ctl.NormAdaptation(statistics="source")]).plan
    assert set(plan.trained) == {"1.weight", "1.bias"}
    model = build()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ctl.SpecError, match="no norm of Sequential keeps running statistics"):
        ctl.adapt(model, build(), [ctl.NormAdaptation()])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_model_without_norms_is_refused():
    with pytest.raises(ctl.SpecError, match="the model has none"):
        ctl.adapt(nn.Linear(2, 2), nn.Linear(2, 2), [ctl.NormAdaptation(statistics="source")])


def test_one_value_a_channel_has_no_variance():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    adaptation = ctl.adapt(model, copy.deepcopy(model), [ctl.NormAdaptation()])
    with pytest.raises(ctl.DataError, match="'1' saw one value a channel"):
        adaptation.measure([(torch.randn(1, 3), torch.tensor([0]))])


def test_fit_measures_and_makes_no_step_where_nothing_is_trained(tmp_path):
    adaptation = ctl.adapt(network(), source(), [ctl.NormAdaptation(train="nothing", statistics="target")])
    before = {name: parameter.clone() for name, parameter in adaptation.model.named_parameters()}
    result = ctl.fit(
        adaptation,
        (X, Y),
        training=ctl.Training(device="cpu"),
        valid={"target": (X, Y)},
        watch={"source": (X, Y)},
        out=tmp_path,
    )
    assert (result.steps, len(result.history)) == (0, 1)
    assert result.best == result.history[0]["target"]["accuracy"]
    assert result.history[0]["source"].keys() == {"loss", "accuracy"}
    assert (tmp_path / "history.jsonl").read_text().count("\n") == 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in adaptation.model.named_parameters())
    expected = layer_by_layer(source(), X, 0)
    assert torch.allclose(adaptation.model[4].running_var, expected[4].running_var, rtol=1e-5)


def test_fit_trains_on_measured_statistics():
    adaptation = ctl.adapt(network(), source(), [ctl.NormAdaptation(statistics="target")])
    ctl.fit(adaptation, (X, Y), training=ctl.Training(device="cpu", epochs=2, batch_size=7))
    expected = layer_by_layer(source(), X, 0)
    assert torch.allclose(adaptation.model[1].running_mean, expected[1].running_mean, rtol=1e-5)


def test_a_state_brings_the_statistics_back_and_they_are_not_measured_again():
    first = adapted(ctl.NormAdaptation())
    second = ctl.adapt(network(), source(), [ctl.NormAdaptation()])
    second.model.load_state_dict(first.model.state_dict())
    second.load_state_dict(first.state_dict())
    assert not second.outstanding()
    assert torch.equal(first.model(X[:2]), second.model(X[:2])) is False or first.model.training  # dropout only
    assert torch.equal(first.model.eval()(X), second.model.eval()(X))


def test_another_model_does_not_remember_the_first():
    strategy = ctl.NormAdaptation(statistics="target")
    adapted(strategy)
    other = ctl.adapt(network(), source(), [strategy])
    assert other.outstanding()
    assert torch.equal(other.model[1].running_mean, source()[1].running_mean)


def test_feature_extraction_and_affine_contradict_each_other():
    with pytest.raises(ctl.PlanError, match="NormAdaptation and FeatureExtraction both choose the frozen"):
        ctl.adapt(network(), source(), [ctl.NormAdaptation(), ctl.FeatureExtraction()])


def test_named_layers_win():
    plan = ctl.adapt(network(), source(), [ctl.NormAdaptation(), ctl.LayerTransfer(layers=1)]).plan
    assert set(plan.trained) == {"4.weight", "4.bias"}
