"""Copies survive what a forward pass, a training step or a library leaves on modules."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import nn

import conservtl as ctl
from conservtl.layers.copying import deep_copy

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
]

X = torch.randn(5, 3, generator=torch.Generator().manual_seed(3))
Y = torch.tensor([0, 1, 1, 0, 1])


class KeepsActivations(nn.Module):
    """Keeps its activations, in containers too, and a lock."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)
        self.kept, self.lock = {}, threading.Lock()

    def forward(self, x):
        self.hidden = self.first(x).tanh()
        self.kept = {"hidden": [self.hidden, (self.hidden * 2,)]}
        return self.last(self.hidden)


def weight_norm():
    return nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.utils.weight_norm(nn.Linear(4, 2)))


def closure():
    """A hook that computes the output and one that keeps it, both closures."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    kept = []
    model[0].register_forward_hook(lambda _, __, output: output * 2)
    model[1].register_forward_hook(lambda _, __, output: kept.append(output))
    return model


def bound_method():
    model = KeepsActivations()
    model.last.register_forward_pre_hook(_Keeper().keep)
    return model


class _Keeper:
    def __init__(self):
        self.lock, self.kept = threading.Lock(), None

    def keep(self, _, inputs):
        self.kept = inputs


def lazy():
    model = nn.Sequential(nn.LazyLinear(4), nn.Tanh(), nn.LazyLinear(2))
    model(X)
    return model


def spectral():
    return nn.Sequential(nn.utils.spectral_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2))


def scripted():
    return nn.Sequential(torch.jit.script(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2))


MODELS = [weight_norm, KeepsActivations, closure, bound_method, lazy, spectral]


def make(build, seed):
    torch.manual_seed(seed)
    return build()


def train(adaptation):
    optimizer = adaptation.optimizer(torch.optim.SGD, lr=0.5)
    for _ in range(2):
        outputs = adaptation.model(X)
        loss = nn.functional.cross_entropy(outputs, Y)
        adaptation.loss(loss, outputs, X).backward()
        optimizer.step()
        optimizer.zero_grad()
    return adaptation.model(X)  # leaves a graph on the modules


@pytest.mark.parametrize("build", [*MODELS, scripted])
def test_a_copy_computes_the_same_and_shares_no_weight(build):
    model = make(build, 0).eval()
    expected = model(X)
    copied = deep_copy(model)
    assert torch.equal(copied(X), expected)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.add_(1.0)
    assert torch.equal(model(X), expected)


@pytest.mark.parametrize(
    ("build", "strategy"),
    [
        *((build, one) for build in MODELS for one in (ctl.OutputConservation(weight=1.0), ctl.FeatureConservation())),
        (scripted, ctl.OutputConservation(weight=1.0)),
    ],
)
def test_models_that_have_run_are_adapted_trained_copied_and_merged(build, strategy):
    """With the source given as a model that has run, too; the source stays as it was."""
    model, source = make(build, 1), make(build, 2)
    model(X), source(X)
    expected = source.eval()(X).detach()
    adaptation = ctl.adapt(model, source, [strategy, ctl.L2SP(alpha=0.1)], example=X)
    train(adaptation)
    after = adaptation.model.eval()(X)
    assert not torch.equal(after, expected)
    assert torch.equal(adaptation.merged().eval()(X), after)
    assert torch.equal(copy.deepcopy(adaptation).model.eval()(X), after)
    torch.testing.assert_close(adaptation.source_view(X).outputs, expected)


def test_a_copied_adaptation_trains_as_its_original():
    def adapted():
        adaptation = ctl.adapt(make(weight_norm, 1), make(weight_norm, 2), [ctl.L2SP(alpha=0.1)])
        train(adaptation)
        return adaptation

    first = adapted()
    second = copy.deepcopy(first)
    torch.testing.assert_close(train(second), train(first), rtol=0, atol=0)


def test_a_copy_shares_a_lock_and_has_containers_of_its_own():
    model = KeepsActivations()
    model(X)
    copied = deep_copy(model)
    assert copied.lock is model.lock
    assert copied.kept is not model.kept
    hidden, (twice,) = copied.kept["hidden"]
    assert hidden is copied.hidden  # one tensor, as in the original
    assert not hidden.requires_grad
    assert torch.equal(twice, model.hidden * 2)


def test_a_scripted_module_has_no_amplitudes():
    """Its computation is not known to be that of a linear map; the other layers have theirs."""
    adaptation = ctl.adapt(make(scripted, 1), make(scripted, 2), [ctl.LHUC(on=["2"], freeze=False)])
    assert [row.name for row in adaptation.plan.rows if row.added] == ["2.lhuc"]


def test_freezing_and_features_of_a_scripted_module_are_refused():
    with pytest.raises(ctl.SpecError, match="of the scripted module Linear is to be frozen"):
        ctl.adapt(make(scripted, 1), make(scripted, 2), [ctl.LayerTransfer(layers=["0"])])
    with pytest.raises(ctl.SpecError, match=r"'0' are compared, and a scripted module takes no hooks"):
        ctl.adapt(make(scripted, 1), make(scripted, 2), [ctl.FeatureConservation(layers=["0"])])


def test_an_error_that_no_attribute_explains_is_raised():
    class Refuses(nn.Module):
        def __deepcopy__(self, memo):
            raise RuntimeError("not me")

    with pytest.raises(RuntimeError, match="not me"):
        deep_copy(Refuses())


def test_hugging_face_models_that_ask_for_gradients_of_their_inputs():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=2, n_head=2, n_embd=8, vocab_size=11, n_positions=8, bos_token_id=0, eos_token_id=0
    )
    ids = torch.tensor([[1, 2, 3, 4]])
    model, source = (transformers.GPT2LMHeadModel(config) for _ in range(2))
    for one in (model, source):
        one.enable_input_require_grads()
        one(ids).logits.mean().backward()
    adaptation = ctl.adapt(model, source, [ctl.OutputConservation(weight=1.0), ctl.L2SP()], example=ids)
    optimizer = adaptation.optimizer(torch.optim.SGD, lr=0.5)
    outputs = model(ids, labels=ids)
    adaptation.loss(outputs.loss, outputs, ids).backward()
    optimizer.step()
    model.eval()
    after = model(ids).logits
    assert torch.equal(adaptation.merged()(ids).logits, after)
    assert torch.equal(copy.deepcopy(adaptation).model(ids).logits, after)
