"""What the strategies that act at each step cover, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.distributed.tensor import Shard

import conservtl as ctl
from conservtl.methods import as_strategy
from conservtl.testing.weights import random_weights

ON_WEIGHTS = [ctl.Projection, ctl.SelectiveDecay, ctl.L1SP, ctl.GroupLassoSP, ctl.Mixout]


def network():
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 2))


DECAYED = ctl.DiscriminativeLR(decay=1.0, decay_biases_and_norms=True)


def adapted(*strategies, **options):
    model = network()
    return ctl.adapt(model, random_weights(model, 0), strategies, **options)


def covered(strategy, *others, **options):
    (update,) = adapted(strategy, *others, **options).plan.updates
    return set(update.names)


@pytest.mark.parametrize("cls", ON_WEIGHTS)
def test_weights_from_the_source_or_all_of_it(cls):
    """What is fresh has nothing to go back to, and what is frozen throughout does not move."""
    assert covered(cls()) == {"0.weight", "2.weight", "3.weight"}
    assert covered(cls(on="all"), fresh=["3"]) == {f"{n}.{kind}" for n in "012" for kind in ("weight", "bias")}
    assert covered(cls(), ctl.LayerTransfer(side="input", layers=1)) == {"2.weight", "3.weight"}


def test_rates_cover_every_kind_and_build_groups_by_layer():
    adaptation = adapted(ctl.AutoRGN(), fresh=["3"])
    optimizer = adaptation.optimizer(torch.optim.SGD, lr=0.1)
    assert [(group.get("layer"), len(group["params"])) for group in optimizer.param_groups] == [
        ("0", 4),
        ("2", 2),
        (None, 2),
    ]


def test_a_layer_whose_weight_decay_differs_has_two_groups_and_one_ratio():
    adaptation = adapted(ctl.AutoRGN(), ctl.L1SP(), DECAYED)
    optimizer = adaptation.optimizer(torch.optim.AdamW, lr=0.1)
    for number, p in enumerate(adaptation.model.parameters()):
        p.grad = torch.full_like(p, float(number + 1))
    optimizer.step()
    found = {}
    for group in optimizer.param_groups:
        found.setdefault(group["layer"], set()).add(group["share"])
    assert {layer: len(shares) for layer, shares in found.items()} == {"0": 1, "2": 1, "3": 1}
    assert len(optimizer.param_groups) == 6


@pytest.mark.parametrize("cls", [ctl.L1SP, ctl.GroupLassoSP, ctl.SelectiveDecay])
def test_the_optimizers_weight_decay_stays_off_what_is_pulled_back(cls):
    optimizer = adapted(cls(), DECAYED, fresh=["3"]).optimizer(torch.optim.AdamW, lr=0.1)
    decays = {name: group["weight_decay"] for group in optimizer.param_groups for name in group["param_names"]}
    off = {name for name, decay in decays.items() if decay == 0}
    assert off == {"0.weight", "2.weight", *(["3.weight"] if cls is not ctl.SelectiveDecay else [])}


@pytest.mark.parametrize(
    ("cls", "fields"),
    [
        (ctl.AutoRGN, {"every": 0}),
        (ctl.AutoRGN, {"floor": 1.1}),
        (ctl.Projection, {"radius": -0.1}),
        (ctl.Projection, {"radius": float("inf")}),
        (ctl.Projection, {"radius": "learned"}),
        (ctl.Projection, {"steps": 10}),
        (ctl.Projection, {"rate": 0.1}),
        (ctl.SelectiveDecay, {"strength": -1}),
        (ctl.L1SP, {"alpha": -1}),
        (ctl.GroupLassoSP, {"beta": -1}),
        (ctl.Mixout, {"p": 1.0}),
        (ctl.Mixout, {"p": -0.1}),
    ],
)
def test_bounds(cls, fields):
    with pytest.raises(ValidationError, match=next(iter(fields))):
        cls(**fields)


def test_spd_is_a_short_name():
    assert as_strategy({"kind": "spd", "strength": 2}) == ctl.SelectiveDecay(strength=2)


@pytest.mark.parametrize("cls", [*ON_WEIGHTS, ctl.AutoRGN])
def test_half_precision_parameters_are_refused(cls):
    model = network().bfloat16()
    adaptation = ctl.adapt(model, random_weights(model, 0), [cls()])
    with pytest.raises(ctl.SpecError, match=rf"{cls.__name__} acts on '0\.weight', which is torch\.bfloat16"):
        adaptation.optimizer(torch.optim.SGD, lr=0.1)


@pytest.mark.parametrize("strategy", [ctl.Mixout(), ctl.Projection(radius="learn")])
def test_sharded_parameters_are_refused_by_what_replaces_weights_for_a_pass(strategy):
    """FSDP2 gathers weights before a module's own hooks, and on its own terms."""
    adaptation = adapted(strategy)
    adaptation.model[0].weight.placements = ()  # what tells a DTensor from a tensor
    with pytest.raises(ctl.SpecError, match=rf"{strategy.label} acts on whole tensors, but '0\.weight' is sharded"):
        adaptation.optimizer(torch.optim.SGD, lr=0.1)


@pytest.mark.parametrize("cls", [cls for cls in (*ON_WEIGHTS, ctl.AutoRGN) if cls is not ctl.Mixout])
def test_sharding_across_rows_is_refused(cls):
    adaptation = adapted(cls())
    adaptation.model[0].weight.placements = (Shard(1),)
    with pytest.raises(ctl.SpecError, match=rf"{cls.__name__} takes .* first dimension, but '0\.weight' is cut"):
        adaptation.optimizer(torch.optim.SGD, lr=0.1)


@pytest.mark.parametrize("cls", [*ON_WEIGHTS, ctl.AutoRGN])
def test_two_of_a_kind_are_refused(cls):
    with pytest.raises(ctl.PlanError, match="both decide"):
        adapted(cls(), cls())


@pytest.mark.parametrize("cls", [*ON_WEIGHTS, ctl.AutoRGN, ctl.SurgicalFineTuning])
def test_the_plan_says_so_in_a_line(cls):
    shown = str(adapted(cls(**({"block": "best"} if cls is ctl.SurgicalFineTuning else {}))).plan)
    assert f"{cls.__name__}: " in shown
