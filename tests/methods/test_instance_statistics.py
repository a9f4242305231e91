"""Norms that mix in each example's own statistics: exact, example by example, and part of the adapted model."""

from __future__ import annotations

import copy
import io
import pickle
import socket

import pytest
import torch
from torch import nn

import conservtl as ctl
from conservtl.experiments.run.bundle import load_adapted
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
    adapted = load_adapted(tmp_path / "out")
    assert len(extended_modules(adapted.model)) > 3
    assert {norm.share for norm in extended_modules(adapted.model).values()} == {1 / 4}
    test = prepare(spec).domains.target_test
    found = [one.label for one in adapted.predict([humming / name for name in test.names])]
    right = [label == name.rpartition("/")[2][0] for label, name in zip(found, test.names, strict=True)]
    assert sum(right) / len(right) == pytest.approx(report["after"]["target"]["accuracy"])


def test_a_runs_folder_is_a_source_that_mixes(speech_fields, tmp_path):
    run(parse_spec({**speech_fields, "strategies": [INSTANCE.model_dump()]}), tmp_path / "first")
    fields = {**speech_fields, "source": {"weights": str(tmp_path / "first" / "model.safetensors")}}
    first = load_adapted(tmp_path / "first")
    test = prepare(parse_spec(fields)).domains.target_test
    right = first.probabilities(test.inputs).argmax(1).eq(test.labels).float().mean()
    for strategies in ([{"kind": "l2_sp"}], [INSTANCE.model_dump()]):
        second = run(parse_spec({**fields, "strategies": strategies}), tmp_path / "second")
        assert second["before"]["target"]["accuracy"] == pytest.approx(float(right))
        assert [one["share"] for one in second["plan"]["extensions"]] == [0.25]


def types(model):
    return [type(module) for module in model.modules()]


class TestTheSameNorm:
    """A norm that mixes is the norm it was, under another class."""

    def test_parameters_buffers_hooks_and_the_state_dict_are_untouched(self):
        model = network()
        norm, weight, mean = model[1], model[1].weight, model[1].running_mean
        calls = []
        norm.register_forward_hook(lambda *_: calls.append(1))
        names = list(model.state_dict())
        ctl.adapt(model, source(), [INSTANCE])
        assert model[1] is norm
        assert (model[1].weight is weight, model[1].running_mean is mean) == (True, True)
        assert list(model.state_dict()) == names
        assert isinstance(norm, nn.BatchNorm2d)
        model(X)
        assert calls == [1]

    def test_it_prints_its_share(self):
        model = ctl.adapt(network(), source(), [INSTANCE]).model
        plain = repr(nn.BatchNorm2d(4))  # with what this version of torch shows
        assert repr(model[1]) == f"InstanceMixing{plain.removesuffix(')')}, share=0.25)"
        assert plain.startswith("BatchNorm2d(4, eps=1e-05, momentum=0.1, affine=True, ")

    def test_there_and_back(self):
        """Ended and begun again, it is the same classes and outputs."""
        model = network()
        plain = types(model)
        first = ctl.adapt(model, source(), [INSTANCE]).model(X)
        mixing = types(model)
        ctl.adapt(model, source())
        assert types(model) == plain
        assert "share" not in vars(model[1])
        assert torch.equal(ctl.adapt(model, source(), [INSTANCE]).model(X), first)
        assert types(model) == mixing

    def test_an_adaptation_that_is_refused_leaves_it(self):
        model = network()
        expected = ctl.adapt(model, source(), [INSTANCE]).model(X)
        with pytest.raises(ctl.SpecError, match="layers=9"):
            ctl.adapt(model, source(), [ctl.LayerTransfer(layers=9)])
        assert torch.equal(model(X), expected)

    def test_another_share_takes_the_place_of_the_first(self):
        model = network()
        ctl.adapt(model, source(), [INSTANCE])
        ctl.adapt(model, source(), [ctl.NormAdaptation(train="all", statistics="instance", prior=1)])
        assert torch.allclose(model(X), obvious(source(), X, 1 / 2))

    def test_a_state_of_another_share_is_refused(self):
        """Its weights would be trained on by other outputs."""
        state = ctl.adapt(network(), source(), [INSTANCE]).state_dict()
        other = ctl.adapt(network(), source(), [ctl.NormAdaptation(train="all", statistics="instance", prior=1)])
        with pytest.raises(ctl.PlanError, match="its extensions differs"):
            other.load_state_dict(state)

    def test_a_copy_has_norms_of_its_own(self):
        model = ctl.adapt(network(), source(), [INSTANCE]).model
        twin = copy.deepcopy(model)
        ctl.adapt(twin, source())
        assert not extended_modules(twin)
        assert torch.allclose(model(X), obvious(source(), X, 1 / 4))

    def test_torch_saves_and_loads_it(self):
        model = ctl.adapt(network(), source(), [INSTANCE]).model
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        again = torch.load(file, weights_only=False)
        assert torch.equal(again(X), model(X))
        assert types(again) == types(model)

    def test_a_frozen_norm_of_a_pickle_stays_in_eval_mode(self):
        model = ctl.adapt(network(), source(), [INSTANCE]).model
        again = pickle.loads(pickle.dumps(model)).train()
        assert not again[1].training
        assert torch.equal(again(X), model(X))


def test_a_norm_used_twice_mixes_at_each_use():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.norm, self.head = nn.Conv1d(2, 2, 1), nn.BatchNorm1d(2), nn.Linear(2, 2)

        def forward(self, x):
            return self.head(self.norm(self.conv(self.norm(x))).mean(2))

    def mixed(norm, x):
        mean = 0.75 * norm.running_mean[None, :, None] + 0.25 * x.mean(2, keepdim=True)
        variance = 0.75 * norm.running_var[None, :, None] + 0.25 * x.var(2, correction=0, keepdim=True)
        return (x - mean) / (variance + norm.eps).sqrt() * norm.weight[:, None] + norm.bias[:, None]

    model, other = Twice(), Twice()
    other.norm.running_mean.add_(1)
    ctl.adapt(model, other.eval(), [INSTANCE])
    x = X[:, :, 0].float()
    expected = other.head(mixed(other.norm, other.conv(mixed(other.norm, x))).mean(2))
    torch.testing.assert_close(model(x), expected)


def test_norms_that_share_their_parameters_mix_both():
    """Each by the statistics that it keeps."""

    def tied():
        model = network()
        model[4].weight, model[4].bias = model[1].weight, model[1].bias
        return model

    other = tied()
    other.load_state_dict(source().state_dict())
    model = ctl.adapt(tied(), other.eval(), [INSTANCE]).model
    assert set(extended_modules(model)) == {"1", "4"}
    assert model[4].weight is model[1].weight
    assert torch.allclose(model(X), obvious(other, X, 1 / 4))


def test_one_module_in_two_places_is_extended_once():
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 1)).double()
    model.append(model[1])
    ctl.adapt(model, copy.deepcopy(model), [INSTANCE])
    assert model[3] is model[1]
    assert list(extended_modules(model)) == ["1"]


def test_a_norm_that_was_synchronised_after_adapting_mixes_once_it_trains():
    """torch puts another module in its place, which the optimizer's making extends again."""
    adaptation = ctl.adapt(network(), source(), [INSTANCE])
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(adaptation.model)
    adaptation.optimizer(torch.optim.SGD, lr=0.1)
    assert [type(norm).__name__ for norm in extended_modules(synchronised).values()] == [
        "InstanceMixingSyncBatchNorm",
        "InstanceMixingSyncBatchNorm",
    ]
    assert torch.allclose(synchronised.train()(X), obvious(source(), X, 1 / 4))


def test_synchronised_norms_mix():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(network())
    ctl.adapt(model, source(), [INSTANCE])
    assert torch.allclose(model.train()(X), obvious(source(), X, 1 / 4))
    assert torch.equal(pickle.loads(pickle.dumps(model))(X), model(X))


def test_a_compiled_model_computes_the_same():
    adaptation = ctl.adapt(network(), source(), [INSTANCE])
    compiled = torch.compile(adaptation.model, backend="aot_eager", fullgraph=True)
    x = X.clone().requires_grad_()
    compiled(x).square().sum().backward()
    gradient = x.grad.clone()
    x.grad = None
    adaptation.model(x).square().sum().backward()
    torch.testing.assert_close(gradient, x.grad)
    torch.testing.assert_close(compiled(X), adaptation.model(X))


def test_a_traced_model_keeps_norms_as_leaves():
    """As torchvision's feature extractors trace: what is in torch.nn is not gone into."""
    model = ctl.adapt(network(), source(), [INSTANCE]).model
    traced = torch.fx.symbolic_trace(model)
    assert torch.equal(traced(X), model(X))


def test_amplitudes_scale_what_a_mixing_norm_puts_out():
    """LHUC finds the norm by what it is without the extension."""
    strategies = [INSTANCE, ctl.LHUC(on=["1"], freeze=False)]
    adaptation = ctl.adapt(network(), source(), strategies, example=X)
    model = adaptation.model
    assert "1.lhuc" in dict(model.named_parameters())
    assert torch.allclose(model(X), obvious(source(), X, 1 / 4))
    with torch.no_grad():
        model[1].lhuc.copy_(torch.tensor([0.3, -0.2, 0.1, 0.5]))
    bare = copy.deepcopy(source())
    with torch.no_grad():
        for tensor in (bare[1].weight, bare[1].bias):
            tensor.mul_(2 * model[1].lhuc.sigmoid())
    assert torch.allclose(model(X), obvious(bare, X, 1 / 4))
    assert torch.allclose(adaptation.merged()(X), obvious(bare, X, 1 / 4))


def test_a_head_fed_from_layers_gets_what_the_mixing_norms_give():
    strategies = [INSTANCE, ctl.FeatureExtraction(layers=["0", "8"])]
    adaptation = ctl.adapt(network(), source(), strategies, example=X)
    last = int(adaptation.layers[0].modules[-1]) + 1
    inner, entering = obvious(source()[:last], X, 1 / 4).mean((2, 3)), obvious(source()[:8], X, 1 / 4)
    head = adaptation.model[8]
    expected = nn.functional.linear(torch.cat([inner, entering], 1), head.weight, head.bias)
    assert torch.allclose(adaptation.model.train()(X), expected)
    assert torch.allclose(copy.deepcopy(adaptation.model)(X), expected)


def test_the_source_model_beside_it_does_not_mix():
    """Given as weights, it is built from the model, which an earlier adaptation may have extended."""
    model = network()
    ctl.adapt(model, source(), [INSTANCE])
    adaptation = ctl.adapt(model, source().state_dict(), [INSTANCE, ctl.OutputConservation(weight=1.0)])
    assert torch.allclose(adaptation.source_view(X).outputs, source()(X))


def _process(rank, port, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    adaptation = ctl.adapt(network(), source(), [INSTANCE])
    model = nn.parallel.DistributedDataParallel(adaptation.model)
    train(model, adaptation.optimizer(torch.optim.SGD, lr=0.1), X[3 * rank : 3 * rank + 3], Y[3 * rank : 3 * rank + 3])
    torch.save(adaptation.model.state_dict(), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def train(model, optimizer, x, y):
    model.train()
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without distributed")
def test_two_processes_train_what_one_does(side_by_side, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    side_by_side(_process, (port, str(tmp_path)))
    alone = ctl.adapt(network(), source(), [INSTANCE])
    train(alone.model, alone.optimizer(torch.optim.SGD, lr=0.1), X, Y)
    for rank in (0, 1):
        for name, tensor in torch.load(tmp_path / f"{rank}.pt").items():
            torch.testing.assert_close(tensor, alone.model.state_dict()[name], msg=name)
