"""Output conservation: the source asked on the same inputs, in eval mode, by its own head."""

from __future__ import annotations

import copy

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.nn import functional as F

import conservtl as ctl
from conservtl.methods.output_conservation import kl_to_source
from conservtl.testing.weights import random_weights

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 0, 1, 2])


def network(classes=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, classes))


def displaced(adaptation):
    with torch.no_grad():
        for parameter in adaptation.model.parameters():
            parameter.add_(0.1)
    return adaptation


def objective(adaptation, x=X, y=Y):
    outputs = adaptation.model(x)
    return adaptation.loss(F.cross_entropy(outputs, y), outputs, x), outputs


def test_the_source_is_asked_in_eval_mode_on_the_same_inputs():
    """Dropout and batch statistics are the student's alone."""
    source = network()
    adaptation = displaced(ctl.adapt(network(), source, [ctl.OutputConservation(weight=1.0, temperature=1.0)]))
    adaptation.model.train()
    loss, outputs = objective(adaptation)
    expected = F.cross_entropy(outputs, Y) + kl_to_source(outputs, source.eval()(X))
    torch.testing.assert_close(loss, expected)


def test_it_is_the_source_as_it_was_not_as_it_becomes():
    """Anchors must be cloned: with the adapted model as its own source the term would be 0 forever."""
    model = network().eval()
    adaptation = displaced(ctl.adapt(model, ctl.itself(missing=[]), [ctl.OutputConservation(weight=1.0)]))
    loss, outputs = objective(adaptation)
    assert loss - F.cross_entropy(outputs, Y) > 1e-4


@pytest.mark.parametrize("given", ["model", "weights"])
def test_new_labels_are_compared_by_the_sources_own_head(given):
    source = network(5).eval()
    weights = source if given == "model" else source.state_dict()
    adaptation = displaced(ctl.adapt(network(3), weights, [ctl.OutputConservation(weight=1.0)]))
    adaptation.model.eval()
    loss, outputs = objective(adaptation)
    body = adaptation.model[:4](X)
    term = kl_to_source(source[4](body), source(X), 2.0)
    torch.testing.assert_close(loss, F.cross_entropy(outputs, Y) + term)
    loss.backward()
    assert adaptation.model[0].weight.grad.any()
    assert all(p.grad is None for p in source.parameters())


def test_a_head_declared_fresh_has_labels_of_its_own_even_where_it_would_fit():
    source = network().eval()
    adaptation = displaced(ctl.adapt(network(), source, [ctl.OutputConservation(weight=1.0)], fresh=["4"]))
    adaptation.model.eval()
    loss, outputs = objective(adaptation)
    term = kl_to_source(source[4](adaptation.model[:4](X)), source(X), 2.0)
    torch.testing.assert_close(loss, F.cross_entropy(outputs, Y) + term)


def test_a_source_without_a_head_cannot_be_asked():
    weights = {name: t for name, t in network().state_dict().items() if not name.startswith("0.")}
    with pytest.raises(ctl.SourceError, match=r"no value for '0.weight'.*source=nn.Module"):
        ctl.adapt(network(), weights, [ctl.OutputConservation()])


def test_the_teacher_is_no_part_of_the_model():
    model = network()
    names = list(model.state_dict())
    adaptation = ctl.adapt(model, network(), [ctl.OutputConservation()])
    assert list(model.state_dict()) == names
    assert adaptation.model is model


def test_a_state_of_another_source_model_is_refused():
    """Its weights would be pulled to one model and its outputs to another."""
    ours, same, other = (
        ctl.adapt(network(), random_weights(network(), seed), [ctl.OutputConservation()]) for seed in (1, 1, 2)
    )
    same.load_state_dict(ours.state_dict())
    with pytest.raises(ctl.PlanError, match=r"another source model: it began with other values in '0\.weight'"):
        other.load_state_dict(ours.state_dict())


def test_a_step_without_the_term_is_refused():
    """It would be plain fine-tuning, and say that it was not."""
    model = network()
    adaptation = ctl.adapt(model, random_weights(model, 0), [ctl.OutputConservation()])
    optimizer = adaptation.optimizer(torch.optim.SGD, lr=0.1)
    x = torch.randn(4, 4)
    optimizer.step()  # no gradient, nothing forgotten
    for forgotten in (True, False, True):
        outputs = model(x)
        loss = outputs.square().mean()
        if forgotten:
            loss.backward()
            with pytest.raises(ctl.SpecError, match=r"OutputConservation adds a term .* adaptation\.loss"):
                optimizer.step()
        else:
            adaptation.loss(loss, outputs, x).backward()
            optimizer.step()
        optimizer.zero_grad()


def test_a_loss_that_is_no_scalar_is_refused():
    adaptation = ctl.adapt(network(), random_weights(network(), 0), [ctl.L2SP()])
    with pytest.raises(ctl.SpecError, match=r"the loss must be a scalar, .*; received shape \(4,\)"):
        adaptation.loss(torch.zeros(4), torch.zeros(4, 2))


def test_inputs_are_needed():
    adaptation = ctl.adapt(network(), network(), [ctl.OutputConservation()])
    with pytest.raises(ctl.SpecError, match=r"OutputConservation compares.*loss\(loss, outputs, inputs\)"):
        adaptation.loss(adaptation.model(X).mean(), None)


def test_a_head_tapped_without_a_forward_pass():
    adaptation = ctl.adapt(network(3), network(5), [ctl.OutputConservation()])
    outputs = torch.zeros(6, 3, requires_grad=True)
    with pytest.raises(ctl.SpecError, match=r"made no forward pass"):
        adaptation.loss(outputs.mean(), outputs, X)


def test_a_view_kept_from_an_earlier_epoch_serves():
    adaptation = displaced(ctl.adapt(network().eval(), network(), [ctl.OutputConservation()]))
    kept = adaptation.source_view(X)
    outputs = adaptation.model(X)
    own = F.cross_entropy(outputs, Y)
    assert torch.equal(adaptation.loss(own, outputs, source=kept), adaptation.loss(own, outputs, X))


class TestFit:
    """Kept outputs, the same augmented view, and resuming."""

    def fit(self, keep, *, augment=None, epochs=3, classes=3):
        torch.manual_seed(0)
        adaptation = ctl.adapt(network(classes), network(), [ctl.OutputConservation(rho=0.7)])
        training = ctl.Training(epochs=epochs, batch_size=4, lr=1e-2, device="cpu")
        ctl.fit(adaptation, (X, Y), training=training, augment=augment, keep_frozen_outputs=keep, seed=0)
        return adaptation.model.state_dict()

    @pytest.mark.parametrize("classes", [3, 5])
    def test_kept_outputs_change_nothing(self, classes):
        kept, asked = self.fit(True, classes=classes), self.fit(False, classes=classes)
        for name, tensor in kept.items():
            torch.testing.assert_close(tensor, asked[name], rtol=1e-5, atol=1e-6)

    def test_the_source_is_asked_once_for_each_example(self):
        source = network()
        asked = []
        source.register_forward_hook(lambda _, inputs, __: asked.append(len(inputs[0])))
        adaptation = ctl.adapt(network(), source, [ctl.OutputConservation()])
        ctl.fit(adaptation, (X, Y), training=ctl.Training(epochs=5, batch_size=4, device="cpu"))
        source_model = adaptation.origin.source_model
        assert source_model is not source
        assert source_model._forward_hooks  # the copy carries the hook, which counts its calls into the same list
        assert sum(asked) == len(X)

    def test_augmented_inputs_are_what_the_source_sees(self):
        """On another view the term would pull toward outputs for something else."""
        source = network()
        seen = []
        source.register_forward_hook(lambda module, inputs, _: seen.append(inputs[0].clone()))
        adaptation = ctl.adapt(network(), source, [ctl.OutputConservation()])
        drawn = []

        def augment(batch, generator):
            inputs = batch[0] + torch.randn(batch[0].shape, generator=generator)
            drawn.append(inputs)
            return inputs, batch[1]

        training = ctl.Training(epochs=2, batch_size=6, device="cpu")
        ctl.fit(adaptation, (X, Y), training=training, augment=augment)
        assert len(seen) == len(drawn) == 2
        assert all(torch.equal(a, b) for a, b in zip(seen, drawn, strict=True))

    def test_what_does_not_fit_into_memory_is_mapped(self, monkeypatch):
        inside = self.fit(True)
        monkeypatch.setattr("conservtl.engine.source_output_cache._LIMIT", 10)
        mapped = self.fit(True)
        assert all(torch.equal(inside[name], tensor) for name, tensor in mapped.items())


def test_hybrid_with_l2_sp():
    """Both act: the pull is in the step, the term in the loss."""
    chosen = [ctl.L2SP(alpha=0.5), ctl.OutputConservation(rho=0.3)]
    adaptation = displaced(ctl.adapt(network().eval(), network(), chosen))
    alone = copy.deepcopy(adaptation)
    optimizer = adaptation.optimizer(torch.optim.SGD, lr=0.1)
    loss, _ = objective(adaptation)
    loss.backward()
    gradient = adaptation.model[0].weight.grad.clone()
    optimizer.step()
    start = alone.start["0.weight"]
    expected = alone.model[0].weight - 0.1 * (gradient + 0.5 * (alone.model[0].weight - start))
    torch.testing.assert_close(adaptation.model[0].weight, expected)


@pytest.mark.parametrize(
    "fields", [{"rho": -0.1}, {"rho": 1.1}, {"weight": -1}, {"temperature": 0}, {"rho": 0.5, "weight": 1.0}]
)
def test_bounds(fields):
    with pytest.raises(ValidationError):
        ctl.OutputConservation(**fields)


def test_two_are_refused():
    with pytest.raises(ctl.PlanError, match="OutputConservation and OutputConservation both decide 'outputs'"):
        ctl.adapt(network(), network(), [ctl.OutputConservation(), ctl.OutputConservation(weight=1.0)])


@pytest.mark.parametrize(
    ("alias", "expected"),
    [
        ({"kind": "kld", "rho": 0.2}, ctl.OutputConservation(rho=0.2)),
        ({"kind": "lwf"}, ctl.OutputConservation(weight=0.05)),
        ({"kind": "lwf", "weight": 1.0}, ctl.OutputConservation(weight=1.0)),
        ({"kind": "kld"}, ctl.OutputConservation()),
        ({"kind": "l2sp", "alpha": 0.3}, ctl.L2SP(alpha=0.3)),
    ],
)
def test_short_names(alias, expected):
    assert ctl.adapt(network(), network(), [alias]).plan == ctl.adapt(network(), network(), [expected]).plan
