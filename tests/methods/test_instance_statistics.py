"""Norms that mix in each example's own statistics: exact, example by example, and part of the adapted model."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import conservtl as ctl
from conservtl.experiments.run.bundle import load
from conservtl.experiments.run.runner import run
from conservtl.experiments.run.setting import prepare
from conservtl.experiments.spec.spec import parse_spec
from conservtl.layers.extended import extended_modules

INSTANCE = ctl.NormAdaptation(train="all", statistics="instance", prior=3)
X = 3 * torch.randn(6, 2, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) + 1
Y = torch.arange(6) % 3


def network(norm=nn.BatchNorm2d, classes=3):
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 4, 3, padding=1), norm(4), nn.ReLU(), nn.Conv2d(4, 4, 3), norm(4), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes)).double()


def source(norm=nn.BatchNorm2d):
    """A model whose norms have seen other data, with scales and shifts of their own."""
    model = network(norm)
    torch.manual_seed(1)
    for _ in range(5):
        model(torch.randn(16, 2, 5, 5, dtype=torch.float64))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return model.eval()


@torch.no_grad()
def obvious(model, x, share):
    """The formula, one example at a time."""
    out = []
    for one in x:
        one = one[None]  # noqa: PLW2901
        for module in model:
            if isinstance(module, nn.BatchNorm2d):
                mean = (1 - share) * module.running_mean + share * one.mean((0, 2, 3))
                variance = (1 - share) * module.running_var + share * one.var((0, 2, 3), correction=0)
                one = nn.functional.batch_norm(one, mean, variance, module.weight, module.bias, eps=module.eps)  # noqa: PLW2901
            else:
                one = module(one)  # noqa: PLW2901
        out.append(one)
    return torch.cat(out)


def test_outputs_are_those_of_the_mixture_in_training_and_after():
    adaptation = ctl.adapt(network(), source(), [INSTANCE])
    expected = obvious(source(), X, 1 / 4)
    assert torch.allclose(adaptation.model.train()(X), expected)
    assert torch.allclose(adaptation.model.eval()(X), expected)
    assert not torch.allclose(source()(X), expected)


def test_all_of_it_is_the_examples_own_and_none_of_it_the_sources():
    whole = ctl.adapt(network(), source(), [ctl.NormAdaptation(statistics="instance", prior=0)]).model
    assert torch.allclose(whole(X), obvious(source(), X, 1.0))
    assert torch.equal(ctl.adapt(network(), source(), [ctl.NormAdaptation(statistics="source")]).model(X), source()(X))


def test_the_default_is_a_sixth():
    adaptation = ctl.adapt(network(), source(), [ctl.NormAdaptation(statistics="instance")])
    assert {norm.share for norm in extended_modules(adaptation.model).values()} == {1 / 6}
    assert "NormAdaptation: statistics 83% as kept, 17% of each example" in str(adaptation.plan)
    assert not adaptation.outstanding()


def test_gradients_are_the_formulas():
    """Through the statistics too: against numbers, not against the code."""
    model = ctl.adapt(network(), source(), [INSTANCE]).model.train()
    assert torch.autograd.gradcheck(lambda x: model(x).sum(0), X[:2].clone().requires_grad_())


def test_copies_pickles_and_merged_models_keep_it():
    adaptation = ctl.adapt(network(), source(), [INSTANCE])
    expected = adaptation.model(X)
    for model in (copy.deepcopy(adaptation.model), pickle.loads(pickle.dumps(adaptation.model)), adaptation.merged()):
        assert torch.equal(model(X), expected)


def test_an_adaptation_that_does_not_ask_for_it_ends_it():
    model = network()
    ctl.adapt(model, source(), [INSTANCE])
    ctl.adapt(model, source())
    assert not extended_modules(model)
    assert torch.equal(model.eval()(X), source()(X))


def test_a_source_that_mixes_is_no_source_for_a_plan_that_does_not():
    """Its weights alone compute something else: what it knows would be lost without a word."""
    mixing = ctl.adapt(network(), source(), [INSTANCE]).model
    with pytest.raises(ctl.SourceError, match=r"mix in 25% .* prior=3"):
        ctl.adapt(network(), mixing)
    again = ctl.adapt(network(), mixing, [INSTANCE]).model
    assert torch.equal(again(X), mixing(X))


def test_asking_twice_mixes_once():
    model = network()
    ctl.adapt(model, source(), [INSTANCE])
    ctl.adapt(model, source(), [INSTANCE]).start_phase(0)
    assert torch.allclose(model(X), obvious(source(), X, 1 / 4))


def test_a_fresh_norm_has_nothing_to_mix_with():
    strategies = [INSTANCE, ctl.LayerTransfer(layers=1, rest="fresh", freeze=False)]
    assert set(extended_modules(ctl.adapt(network(), source(), strategies).model)) == {"1"}


def test_a_norm_without_parameters_goes_by_its_layer():
    def norm(channels):
        return nn.BatchNorm2d(channels, affine=False)

    model = ctl.adapt(network(norm), source(norm), [INSTANCE]).model
    assert torch.allclose(model(X), obvious(source(norm), X, 1 / 4))


def test_a_norm_with_a_forward_of_its_own_still_does_the_rest():
    """As timm's, which activate in the same module."""

    class Activated(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x).relu()

    first = ctl.adapt(network(Activated), source(Activated), [INSTANCE]).model
    assert torch.allclose(first(X), ctl.adapt(network(), source(), [INSTANCE]).model(X))


def test_half_precision_is_computed_in_single():
    """The mean of values near 1000 with a deviation of 1 is lost in bf16."""
    model, other = nn.Sequential(nn.BatchNorm2d(2)), nn.Sequential(nn.BatchNorm2d(2))
    ctl.adapt(model, other, [ctl.NormAdaptation(train="all", statistics="instance", prior=0)])
    x = (1000 + 8 * torch.randn(4, 2, 6, 6, generator=torch.Generator().manual_seed(0))).bfloat16()
    expected = ctl.adapt(copy.deepcopy(model), other, [ctl.NormAdaptation(statistics="instance", prior=0)]).model
    assert torch.allclose(model(x).float(), expected(x.float()), atol=0.05)


def test_only_batch_norms_that_keep_statistics_can():
    def build():
        return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))

    with pytest.raises(ctl.SpecError, match="NormAdaptation: no batch norm of Sequential keeps running statistics"):
        ctl.adapt(build(), build(), [INSTANCE])


def test_where_it_is_not_required_a_model_without_such_norms_is_left_as_it_is():
    """So that a recipe serves a transformer, too: nothing is planned, frozen or mixed."""
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    wanted = INSTANCE.model_copy(update={"required": False})
    adaptation = ctl.adapt(model, copy.deepcopy(model), [wanted, ctl.L2SP()])
    assert adaptation.plan == ctl.adapt(model, copy.deepcopy(model), [ctl.L2SP()]).plan
    assert len(extended_modules(ctl.adapt(network(), source(), [wanted]).model)) == 2


def test_one_value_a_channel_has_no_statistics_of_its_own():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    plain = copy.deepcopy(model).eval()
    ctl.adapt(model, copy.deepcopy(model), [INSTANCE])
    assert torch.equal(model(X[:, 0, 0, :3].float()), plain(X[:, 0, 0, :3].float()))


def test_a_runs_folder_gives_it_back(speech_fields, humming, tmp_path):
    spec = parse_spec({**speech_fields, "strategies": [INSTANCE.model_dump()]})
    report = run(spec, tmp_path / "out")
    adapted = load(tmp_path / "out")
    assert len(extended_modules(adapted.model)) > 3
    assert {norm.share for norm in extended_modules(adapted.model).values()} == {1 / 4}
    test = prepare(spec).domains.target_test
    found = [one.label for one in adapted.predict([humming / name for name in test.names])]
    right = [label == name.rpartition("/")[2][0] for label, name in zip(found, test.names, strict=True)]
    assert sum(right) / len(right) == pytest.approx(report["after"]["target"]["accuracy"])


def test_a_runs_folder_is_a_source_that_mixes(speech_fields, tmp_path):
    run(parse_spec({**speech_fields, "strategies": [INSTANCE.model_dump()]}), tmp_path / "first")
    fields = {**speech_fields, "source": {"weights": str(tmp_path / "first" / "model.safetensors")}}
    with pytest.raises(ctl.SourceError, match="mix in 25%"):
        run(parse_spec(fields), tmp_path / "second")
    second = run(parse_spec({**fields, "strategies": [INSTANCE.model_dump()]}), tmp_path / "second")
    first = load(tmp_path / "first")
    test = prepare(parse_spec(fields)).domains.target_test
    right = first.probabilities(test.inputs).argmax(1).eq(test.labels).float().mean()
    assert second["before"]["target"]["accuracy"] == pytest.approx(float(right))
