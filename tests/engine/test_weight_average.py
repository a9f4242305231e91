"""``Training.ema``: evaluations, the weights that are kept and the result are an exponential average of the weights."""

from __future__ import annotations

import copy

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional as F

import conservtl as ctl


def by_hand(adaptation, data, decay, epochs=3):
    """Train in a loop of torch alone; return the average after each epoch."""
    model = adaptation.model
    optimizer = adaptation.optimizer(torch.optim.SGD, lr=0.05, momentum=0.9)
    mean = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    averages = []
    torch.manual_seed(3)
    for epoch in range(epochs):
        if epoch == 2 and len(adaptation.plan.phases) > 1:
            adaptation.start_phase(1)
        model.train()
        for index in torch.randperm(50).split(16):
            F.cross_entropy(model(data[0][index]), data[1][index]).backward()
            optimizer.step()
            optimizer.zero_grad()
            for name, tensor in model.state_dict().items():
                floating = tensor.is_floating_point()
                mean[name] = decay * mean[name] + (1 - decay) * tensor if floating else tensor.clone()
        averages.append(copy.deepcopy(mean))
    return averages


def settings(**more):
    return ctl.Training(**{"epochs": 3, "batch_size": 16, "optimizer": "sgd", "lr": 0.05, "ema": 0.9, **more})


def close(model, expected):
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("strategy", [ctl.L2SP(), ctl.Mixout(p=0.5), ctl.GradualUnfreezing(epochs=2)])
def test_the_result_is_the_average(plain, data, decay, strategy):
    """Also of mixed weights, which are plain after a step, and of layers that a later phase trains."""
    expected, found = plain(strategy), plain(strategy)
    averages = by_hand(expected, data, decay)
    ctl.fit(found, data, training=settings(ema=decay), seed=3)
    close(found.model, averages[-1])


def test_evaluations_are_of_the_average(plain, data):
    averages = by_hand(plain(), data, 0.9)
    found = plain()
    result = ctl.fit(found, data, watch={"target": data}, training=settings(), seed=3)
    for line, average in zip(result.history, averages, strict=True):
        model = plain().model.eval()
        model.load_state_dict(average)
        with torch.no_grad():
            loss = F.cross_entropy(model(data[0]), data[1]).item()
        assert line["target"]["loss"] == pytest.approx(loss, rel=1e-5)


def test_the_best_average_is_kept(plain, data):
    """A rate so high that a later epoch is worse: the weights that are kept are those that were evaluated."""
    found = plain()
    result = ctl.fit(found, data, {"target": data}, settings(keep="target", lr=0.5, epochs=6), seed=3)
    best = max(line["valid"]["target"]["accuracy"] for line in result.history)
    model = found.model.eval()
    with torch.no_grad():
        assert (model(data[0]).argmax(1) == data[1]).float().mean().item() == pytest.approx(best) == result.best


def test_a_run_goes_on_with_its_average(plain, data, tmp_path, interrupting, same):
    whole, rest = plain(), plain()
    ctl.fit(whole, data, training=settings(), seed=3)
    with pytest.raises(KeyboardInterrupt):
        ctl.fit(plain(), data, training=settings(), seed=3, out=tmp_path, forward=interrupting(6))
    ctl.fit(rest, data, training=settings(), out=tmp_path, resume=True)
    assert same(rest.model, whole.model)
    with pytest.raises(ctl.SpecError, match=r"training\.ema=0\.9, but now it is None"):
        ctl.fit(plain(), data, training=settings(ema=None), out=tmp_path, resume=True)


def test_timms_average(plain, data):
    utils = pytest.importorskip("timm.utils")
    expected, found = plain(ctl.L2SP()), plain(ctl.L2SP())
    average = utils.ModelEmaV3(expected.model, decay=0.9)
    optimizer = expected.optimizer(torch.optim.SGD, lr=0.05, momentum=0.9)
    torch.manual_seed(3)
    for _ in range(3):
        for index in torch.randperm(50).split(16):
            F.cross_entropy(expected.model.train()(data[0][index]), data[1][index]).backward()
            optimizer.step()
            optimizer.zero_grad()
            average.update(expected.model)
    ctl.fit(found, data, training=settings(), seed=3)
    close(found.model, average.module.state_dict())


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_a_decay_is_a_proper_share(decay):
    with pytest.raises(ValidationError):
        ctl.Training(ema=decay)
