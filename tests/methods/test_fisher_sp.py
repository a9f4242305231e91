"""L2-SP-Fisher: the Fisher against plain loops, the pull it weighs, where it is measured and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import conservtl as ctl
from conservtl.layers import named_parameters

X = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1, 2, 0, 1, 1])
BATCHES = [(X[:4], Y[:4]), (X[4:], Y[4:])]  # of different sizes: a mean over batches is not one over examples


def net(seed=0, classes=3):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, classes)).double()


def measured(*strategies, batches=BATCHES, on="target", model=None, source=None):
    adaptation = ctl.adapt(model or net(), source or net(7), strategies)
    adaptation.measure(batches, on=on)
    return adaptation


def reference(model, x, shares):
    """Mean over examples of the sum over labels of share × squared gradient of the log-likelihood."""
    model = copy.deepcopy(model).eval()
    total = {name: torch.zeros_like(p) for name, p in named_parameters(model).items()}
    for i in range(len(x)):
        for label in range(shares.shape[1]):
            model.zero_grad()
            model(x[i : i + 1]).log_softmax(-1)[0, label].backward()
            for name, p in named_parameters(model).items():
                total[name] += shares[i, label] * p.grad**2 / len(x)
    return total


class TestMeasured:
    def test_a_forward_that_is_no_function(self):
        adaptation = ctl.adapt(net(), net(1), [ctl.FisherSP()])
        with pytest.raises(ctl.SpecError, match=r"forward must be a function \(model, batch\) -> outputs; received 3"):
            adaptation.measure(BATCHES, forward=3)

    @pytest.mark.parametrize("fisher", ["empirical", "true"])
    def test_is_the_mean_over_examples_of_squared_gradients(self, fisher):
        """Of the labels' log-likelihood, or in expectation over the model's own outputs; in eval mode, whole."""
        adaptation = measured(ctl.FisherSP(fisher=fisher, normalize="none", on="all"))
        with torch.no_grad():
            own = adaptation.model.eval()(X).softmax(-1)
        shares = own if fisher == "true" else F.one_hot(Y, 3).double()
        expected = reference(adaptation.model, X, shares)
        found = adaptation.measured["fisher"]
        assert found.keys() == expected.keys()
        for name, square in found.items():
            torch.testing.assert_close(square, expected[name], rtol=1e-9, atol=1e-14)

    def test_is_not_the_square_of_the_batch_gradient(self):
        """The defect of other implementations: their value is far smaller."""
        adaptation = measured(ctl.FisherSP(normalize="none"), batches=[(X, Y)])
        model = copy.deepcopy(adaptation.model).eval()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(X), Y), model[0].weight)
        assert adaptation.measured["fisher"]["0.weight"].sum() > 2 * gradient.square().sum()

    def test_does_not_depend_on_how_the_data_is_cut(self):
        one, two = (measured(ctl.FisherSP(), batches=batches).measured["fisher"] for batches in ([(X, Y)], BATCHES))
        for name, square in one.items():
            torch.testing.assert_close(square, two[name], rtol=1e-12, atol=0)

    def test_drawn_labels_come_near_the_expectation_and_are_the_same_each_time(self):
        exact, drawn, again = (
            measured(ctl.FisherSP(fisher="true", normalize="none", draws=draws)).measured["fisher"]["0.weight"]
            for draws in (None, 150, 150)
        )
        assert torch.equal(drawn, again)
        torch.testing.assert_close(drawn, exact, rtol=0.3, atol=1e-3)
        assert not torch.equal(drawn, exact)

    def test_many_classes_are_drawn(self):
        """The exact expectation would cost a gradient a class."""
        many = measured(ctl.FisherSP(fisher="true", normalize="none"), model=net(classes=40), source=net(7, 40))
        few = measured(ctl.FisherSP(fisher="true", normalize="none", draws=8), model=net(classes=40), source=net(7, 40))
        assert torch.equal(many.measured["fisher"]["0.weight"], few.measured["fisher"]["0.weight"])

    def test_normalised_then_floored_and_clipped(self):
        """On average 1 over all that is covered; floor and clip are in units of that mean."""
        bare = measured(ctl.FisherSP(normalize="none")).measured["fisher"]
        mean = torch.cat([square.flatten() for square in bare.values()]).mean()
        found = measured(ctl.FisherSP(floor=0.2, clip=1.5)).measured["fisher"]
        for name, square in bare.items():
            torch.testing.assert_close(found[name], (square / mean).clamp(0.2, 1.5))
        every = torch.cat([square.flatten() for square in found.values()])
        assert every.min() == 0.2
        assert every.max() == 1.5

    def test_on_source_data_with_the_source_model_and_its_own_head(self):
        """The target has two classes of its own; the source's data has the source's three."""
        source = net(7)
        strategy = ctl.FisherSP(data="source", normalize="none")
        adaptation = ctl.adapt(net(classes=2), source, [strategy])
        adaptation.measure([(X, Y.clamp(max=1))])
        assert [one.name for one in adaptation.outstanding()] == ["fisher"]
        adaptation.measure(BATCHES, on="source")
        expected = reference(source, X, F.one_hot(Y, 3).double())["0.weight"]
        torch.testing.assert_close(adaptation.measured["fisher"]["0.weight"], expected)
        assert set(adaptation.measured["fisher"]) == {"0.weight"}  # the head is fresh

    def test_leaves_everything_as_found(self):
        """Modes, gradients, buffers, what is frozen, and the random generators."""
        adaptation = ctl.adapt(net(), net(7), [ctl.FisherSP(fisher="true", draws=2), ctl.LayerTransfer(layers=1)])
        model = adaptation.model
        model.train()
        model(X).sum().backward()
        before = copy.deepcopy(model.state_dict())
        gradients = {name: p.grad for name, p in model.named_parameters()}
        trained = [p.requires_grad for p in model.parameters()]
        generator = torch.get_rng_state()
        modes = [module.training for module in model.modules()]
        adaptation.measure(BATCHES)
        assert torch.equal(generator, torch.get_rng_state())
        assert [module.training for module in model.modules()] == modes
        assert [p.requires_grad for p in model.parameters()] == trained
        assert all(p.grad is gradients[name] for name, p in model.named_parameters())
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


class TestPull:
    @pytest.mark.parametrize("mode", ["coupled", "decoupled"])
    def test_a_step_weighs_each_element(self, mode):
        """Coupled: the gradient gets alpha F (w - w0). Decoupled: w moves lr alpha F of the way, and not beyond."""
        alpha, rate = (0.3, 0.1) if mode == "coupled" else (9.0, 0.1)
        adaptation = measured(ctl.FisherSP(alpha=alpha, mode=mode, beta=0))
        optimizer = adaptation.optimizer(torch.optim.SGD, lr=rate)
        weight, f = adaptation.model[0].weight, adaptation.measured["fisher"]["0.weight"]
        start = weight.detach().clone()
        with torch.no_grad():
            weight.add_(torch.randn_like(weight))
        moved = weight.detach().clone()
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        share = rate * alpha * f
        if mode == "decoupled":
            assert share.max() > 1
            share = share.clamp(max=1)
        torch.testing.assert_close(weight.detach(), moved - share * (moved - start) - rate)

    def test_penalty_is_the_formula(self):
        adaptation = measured(
            ctl.FisherSP(alpha=0.4, beta=0.2, on="all"), model=net(classes=2), batches=[(X, Y.clamp(max=1))]
        )
        model = adaptation.model
        start = {name: p.detach().clone() for name, p in model.named_parameters()}
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.3)
        f = adaptation.measured["fisher"]
        expected = sum(0.4 / 2 * (f[name] * (p - start[name]) ** 2).sum() for name, p in model[:2].named_parameters())
        expected = expected + 0.2 / 2 * sum(p.square().sum() for p in model[4].parameters())
        torch.testing.assert_close(adaptation.penalty(), expected)
        expected.backward()
        wanted = model[0].weight.grad.clone()
        model.zero_grad()
        adaptation.penalty().backward()
        torch.testing.assert_close(model[0].weight.grad, wanted)

    def test_together_with_output_conservation(self):
        """The hybrid of Ghorbani et al. 2019: a step is that of the sum of both."""
        adaptation = measured(ctl.FisherSP(alpha=0.5), ctl.OutputConservation(rho=0.4))
        optimizer = adaptation.optimizer(torch.optim.SGD, lr=0.1)
        model = adaptation.model.eval()
        source = copy.deepcopy(model)
        with torch.no_grad():
            model[0].weight.add_(0.2)
        twin = copy.deepcopy(model)
        soft = F.cross_entropy(twin(X), source(X).softmax(-1).detach())
        pull = sum(
            0.5 / 2 * (adaptation.measured["fisher"][name] * (p - q.detach()) ** 2).sum()
            for (name, p), q in zip(twin.named_parameters(), source.parameters(), strict=True)
            if name in adaptation.measured["fisher"]
        )
        objective = 0.6 * F.cross_entropy(twin(X), Y) + 0.4 * soft + pull
        expected = [
            p - 0.1 * g
            for p, g in zip(twin.parameters(), torch.autograd.grad(objective, list(twin.parameters())), strict=True)
        ]
        outputs = model(X)
        adaptation.loss(F.cross_entropy(outputs, Y), outputs, X).backward()
        optimizer.step()
        for p, q in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-9)

    def test_a_scaled_fused_step(self):
        """An fp16 scaler's factor that a fused optimizer divides out is on the weighed pull too."""
        adaptation = measured(
            ctl.FisherSP(alpha=0.3), model=net().float(), source=net(7).float(), batches=[(X.float(), Y)]
        )
        optimizer = adaptation.optimizer(torch.optim.SGD, lr=0.1)
        weight, f = adaptation.model[0].weight, adaptation.measured["fisher"]["0.weight"]
        start = weight.detach().clone()
        with torch.no_grad():
            weight.add_(0.5)
        weight.grad = torch.zeros_like(weight)
        optimizer.grad_scale = torch.tensor(1024.0)
        try:
            adaptation.bound.hook._before_step(optimizer, (optimizer,), {})
        finally:
            del optimizer.grad_scale
        torch.testing.assert_close(weight.grad, 1024 * 0.3 * f * (weight.detach() - start))


class TestSaved:
    def test_state_brings_it_back(self):
        ours = measured(ctl.FisherSP())
        theirs = ctl.adapt(net(), net(7), [ctl.FisherSP()])
        theirs.load_state_dict(ours.state_dict())
        assert not theirs.outstanding()
        for name, square in ours.measured["fisher"].items():
            assert torch.equal(square, theirs.measured["fisher"][name])

    def test_one_that_was_saved_is_used_instead(self):
        ours = measured(ctl.FisherSP())
        theirs = ctl.adapt(net(), net(7), [ctl.FisherSP()])
        theirs.use_measured("fisher", ours.measured["fisher"])
        theirs.measure([(X * 100, Y)])  # nothing is left to measure
        assert torch.equal(theirs.measured["fisher"]["0.weight"], ours.measured["fisher"]["0.weight"])
        theirs.optimizer(torch.optim.SGD, lr=0.1)


class TestRefused:
    def test_not_measured_yet(self):
        adaptation = ctl.adapt(net(), net(7), [ctl.FisherSP(data="source")])
        with pytest.raises(ctl.SpecError, match=r"FisherSP needs a measurement first .* on='source'"):
            adaptation.optimizer(torch.optim.SGD, lr=0.1)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda f: f | {"0.weight": torch.ones(1, 3)}, r"of shape \(4, 3\); it has shape \(1, 3\)"),
            (lambda f: {"4.weight": f["4.weight"]}, r"'0\.weight', of shape \(4, 3\); it has nothing"),
            (lambda f: f | {"0.weight": -f["0.weight"]}, r"at least 0; for '0\.weight' it reaches from -"),
            (lambda f: f | {"0.weight": f["0.weight"] / 0}, "must be finite"),
        ],
    )
    def test_one_that_does_not_fit(self, change, message):
        """A tensor that would broadcast is refused as one that would not, before training."""
        wrong = change(dict(measured(ctl.FisherSP()).measured["fisher"]))
        adaptation = ctl.adapt(net(), net(7), [ctl.FisherSP()])
        with pytest.raises(ctl.SpecError, match=message):
            adaptation.use_measured("fisher", wrong)
        assert adaptation.outstanding()
        adaptation.measured["fisher"] = wrong
        with pytest.raises(ctl.SpecError, match=message):
            adaptation.optimizer(torch.optim.SGD, lr=0.1)

    def test_a_name_that_the_plan_does_not_measure(self):
        with pytest.raises(ctl.SpecError, match=r"the plan measures \['fisher'\]; received 'fischer'"):
            ctl.adapt(net(), net(7), [ctl.FisherSP()]).use_measured("fischer", {})

    def test_frames_have_no_labels_to_take_from_the_outputs(self):
        """The empirical Fisher needs the loss only."""
        frames = torch.randn(2, 5, 3, dtype=torch.float64)
        batches = [(frames, torch.zeros(2, 5, dtype=torch.long))]
        model, source = nn.Linear(3, 4).double(), nn.Linear(3, 4).double()

        def loss(outputs, batch):
            return F.cross_entropy(outputs.flatten(0, 1), batch[1].flatten())

        adaptation = ctl.adapt(model, source, [ctl.FisherSP(fisher="true")])
        with pytest.raises(ctl.SpecError, match=r"logits \(N, classes\); the model gives shape \(2, 5, 4\)"):
            adaptation.measure(batches, loss=loss)
        adaptation = ctl.adapt(model, source, [ctl.FisherSP(normalize="none")])
        adaptation.measure(batches, loss=loss)
        gradients = [
            torch.autograd.grad(loss(model(frames[i : i + 1]), (None, batches[0][1][i : i + 1])), model.weight)[0]
            for i in range(2)
        ]
        torch.testing.assert_close(adaptation.measured["fisher"]["weight"], sum(g**2 for g in gradients) / 2)

    @pytest.mark.parametrize(("value", "what"), [(0.0, "zero everywhere"), (float("nan"), "not finite")])
    def test_a_fisher_that_says_nothing(self, value, what):
        adaptation = ctl.adapt(net(), net(7), [ctl.FisherSP()])
        with pytest.raises(ctl.SpecError, match=f"the Fisher information is {what}"):
            adaptation.measure(BATCHES, loss=lambda outputs, _: outputs.sum() * value)

    def test_fields(self):
        with pytest.raises(ValueError, match="clip must be at least floor"):
            ctl.FisherSP(floor=2, clip=1)
        with pytest.raises(ValueError, match="greater than or equal to 0"):
            ctl.FisherSP(alpha=-1)

    def test_two_that_pull(self):
        """Also where their strengths agree: one weighs the elements, the other does not."""
        with pytest.raises(ctl.PlanError, match=r"FisherSP and L2SP|L2SP and FisherSP"):
            ctl.adapt(net(), net(7), [ctl.FisherSP(alpha=0.1), ctl.L2SP(alpha=0.1)])


def test_short_name():
    """Kirkpatrick et al. measure on the old task's data."""
    (strategy,) = ctl.adapt(net(), net(7), [{"kind": "ewc", "alpha": 3}]).origin.strategies
    assert strategy == ctl.FisherSP(alpha=3, data="source")
