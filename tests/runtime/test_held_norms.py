"""A held norm keeps its statistics when others set them to 0 and 1 to compute them anew."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, update_bn

import conservtl as ctl

BATCHES = [torch.tensor([[1.0], [3.0]]), torch.tensor([[5.0], [11.0]])]
"""Means of 2 and 8, unbiased variances of 2 and 18: their average over batches is 5 and 10."""


def adapted(*strategies: ctl.Strategy) -> ctl.Adaptation:
    """Two norms of one channel: the first from the source with 4 and 9, the second with 0.5 and 0.25."""
    model = nn.Sequential(nn.BatchNorm1d(1), nn.Linear(1, 1), nn.BatchNorm1d(1), nn.Linear(1, 1))
    source = copy.deepcopy(model.state_dict())
    for number, (mean, variance) in {0: (4.0, 9.0), 2: (0.5, 0.25)}.items():
        source[f"{number}.running_mean"].fill_(mean)
        source[f"{number}.running_var"].fill_(variance)
    return ctl.adapt(model, source, strategies, layers=["0.*", "1.*", "2.*", "3.*"])


def statistics(norm: nn.Module) -> tuple[float, float]:
    return norm.running_mean.item(), norm.running_var.item()


def lightning(batches: list[torch.Tensor], model: nn.Module) -> None:
    """What Lightning's StochasticWeightAveraging does to norms before its last epoch, and after it."""
    momenta = {}
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean = torch.zeros_like(module.running_mean)
            module.running_var = torch.ones_like(module.running_var)
            momenta[module] = module.momentum
            module.momentum = None
            module.num_batches_tracked *= 0
    model.train()
    for batch in batches:
        model(batch)
    for module, momentum in momenta.items():
        module.momentum = momentum


COPIES = {
    "itself": lambda model: model,
    "copy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "averaged": AveragedModel,
    "in double": lambda model: model.double().float(),
}
WAYS = {"torch": update_bn, "lightning": lightning}
HELD = {"frozen": [ctl.LayerTransfer(layers=["0*"])], "source": [ctl.NormAdaptation(statistics="source", train="all")]}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("update", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("strategies", HELD.values(), ids=HELD)
def test_a_held_norm_cannot_be_reset(strategies, update, copied):
    """And what follows is measured behind it as it is; a norm that is not held is computed anew."""
    model = copied(adapted(*strategies).model)
    first, linear, second, _ = getattr(model, "module", model)
    update(BATCHES, model)
    assert statistics(first) == (4.0, 9.0)
    if isinstance(strategies[0], ctl.LayerTransfer):
        model.eval()
        with torch.no_grad():
            inputs = [linear((batch - 4) / (9 + first.eps) ** 0.5) for batch in BATCHES]
        mean = sum(x.mean() for x in inputs) / 2
        variance = sum(x.var() for x in inputs) / 2
        assert statistics(second) == pytest.approx((mean.item(), variance.item()), rel=1e-5)
    else:
        assert statistics(second) == (0.5, 0.25)


@pytest.mark.parametrize("update", WAYS.values(), ids=WAYS)
def test_a_norm_that_follows_is_reset(update):
    """The average over the two batches of their means and unbiased variances."""
    model = adapted().model
    update(BATCHES, model)
    assert statistics(model[0]) == (5.0, 10.0)


@pytest.mark.parametrize("update", WAYS.values(), ids=WAYS)
def test_a_norm_that_a_later_phase_frees_is_reset_then(update):
    adaptation = adapted(ctl.LPFT(epochs=1))
    update(BATCHES, adaptation.model)
    assert statistics(adaptation.model[0]) == (4.0, 9.0)
    adaptation.start_phase(1)
    update(BATCHES, adaptation.model)
    assert statistics(adaptation.model[0]) == (5.0, 10.0)
    assert not {"train", "reset_running_stats", "register_buffer"} & set(vars(adaptation.model[0]))


def test_other_values_are_taken():
    """Loading a state, and assigning statistics that someone computed."""
    adaptation = adapted(ctl.LayerTransfer(layers=["0*"]))
    norm = adaptation.model[0]
    norm.running_mean = torch.tensor([7.0])
    assert statistics(norm) == (7.0, 9.0)
    state = {name: t + 1 for name, t in adaptation.model.state_dict().items()}
    for assign in (False, True):
        adaptation.model.load_state_dict({name: t + assign for name, t in state.items()}, assign=assign)
        assert statistics(norm) == (8.0 + assign, 10.0 + assign)
    adaptation.model.load_state_dict(adapted().model.state_dict())
    assert statistics(norm) == (4.0, 9.0)


def test_statistics_that_are_measured_are_held():
    """They are those of the target from then on."""
    adaptation = adapted(ctl.NormAdaptation(statistics="target", train="all"))
    adaptation.measure([(batch, torch.zeros(2)) for batch in BATCHES])
    expected = statistics(adaptation.model[0])
    assert expected == pytest.approx((5.0, torch.cat(BATCHES).var().item()))
    for update in WAYS.values():
        update(BATCHES, adaptation.model)
        assert statistics(adaptation.model[0]) == expected


def test_the_next_adaptation_can_reset_a_fresh_norm():
    """One that holds the source's statistics although it is declared fresh begins anew, held before or not."""
    adaptation = adapted(ctl.LayerTransfer(layers=["0*"]))
    model = adaptation.model
    ctl.adapt(model, copy.deepcopy(model.state_dict()), fresh=["0.*"], layers=["0.*", "1.*", "2.*", "3.*"])
    assert statistics(model[0]) == (0.0, 1.0)


def test_recomputing_is_asked_for_and_so_includes_held_norms():
    """Even from values that are not finite."""
    adaptation = adapted(ctl.LayerTransfer(layers=["0*"]))
    norm = adaptation.model[0]
    norm.running_mean.fill_(float("inf"))
    ctl.recompute_statistics(adaptation.model, [(batch, None) for batch in BATCHES])
    assert statistics(norm) == (5.0, 10.0)
