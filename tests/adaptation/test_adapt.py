"""The adaptation in hand-written loops: the pull acts exactly once; misuse is refused."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
from torch import nn
from torch.amp import GradScaler

import conservtl as ctl
from conservtl.testing.weights import random_weights

X = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
Y = torch.arange(8) % 2
COUPLED = ctl.L2SP(alpha=0.5, beta=0.3, on="all")
DECOUPLED = ctl.L2SP(alpha=0.5, beta=0.3, on="all", mode="decoupled")
FUSED = [(cls, fused) for cls in (torch.optim.SGD, torch.optim.AdamW) for fused in (False, True)]


def network(classes=2):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, classes))


def adapted(strategy=COUPLED, *, off=0.3, fresh=("4",), model=None):
    """A model moved away from its anchors, so that the pull acts from the first step."""
    model = network() if model is None else model
    adaptation = ctl.adapt(model, random_weights(model, 1), [strategy] if strategy else [], fresh=list(fresh))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(off)
    return adaptation


def loss_of(adaptation, rows=slice(None)):
    return nn.functional.cross_entropy(adaptation.model(X[rows]), Y[rows])


def weights(adaptation):
    return torch.cat([p.detach().flatten() for p in adaptation.model.parameters()])


def reference(cls, steps=4, *, clip=None, strategy=COUPLED, **options):
    """The weights after training with the penalty in the loss, without AMP."""
    adaptation = adapted(strategy)
    optimizer = adaptation.optimizer(cls, lr=0.05, pull=False, **options)
    for _ in range(steps):
        optimizer.zero_grad()
        (loss_of(adaptation) + adaptation.penalty()).backward()
        if clip:
            nn.utils.clip_grad_norm_(adaptation.model.parameters(), clip)
        optimizer.step()
    return weights(adaptation)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)


class TestInTheStep:
    @pytest.mark.parametrize(("cls", "fused"), FUSED)
    @pytest.mark.parametrize("scaled", [False, True], ids=["plain", "GradScaler"])
    @pytest.mark.parametrize("accumulate", [1, 4])
    def test_is_the_term_in_the_loss(self, cls, fused, scaled, accumulate):
        """A fused optimizer under a scaler without unscale_: the pull must not be divided by 65536."""
        adaptation = adapted()
        optimizer = adaptation.optimizer(cls, lr=0.05, fused=fused)
        scaler = GradScaler("cpu", enabled=scaled)
        for _ in range(4):
            optimizer.zero_grad()
            for part in range(accumulate):
                rows = slice(part * 8 // accumulate, (part + 1) * 8 // accumulate)
                scaler.scale(loss_of(adaptation, rows) / accumulate).backward()
            scaler.step(optimizer)
            scaler.update()
        close(weights(adaptation), reference(cls))
        assert (weights(adaptation) - reference(cls, strategy=None)).abs().max() > 0.01

    @pytest.mark.parametrize(("cls", "fused"), FUSED)
    @pytest.mark.parametrize("scaled", [False, True], ids=["plain", "GradScaler"])
    @pytest.mark.parametrize("unscaled", ["by the caller", "by pull"])
    def test_pull_before_clipping_is_clipped_with_the_rest(self, cls, fused, scaled, unscaled):
        adaptation = adapted()
        optimizer = adaptation.optimizer(cls, lr=0.05, fused=fused)
        scaler = GradScaler("cpu", enabled=scaled)
        for _ in range(4):
            optimizer.zero_grad()
            scaler.scale(loss_of(adaptation)).backward()
            if unscaled == "by the caller":
                scaler.unscale_(optimizer)
            adaptation.pull(scaler if unscaled == "by pull" or not scaled else None)
            nn.utils.clip_grad_norm_(adaptation.model.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update()
        close(weights(adaptation), reference(cls, clip=0.1))

    def test_bfloat16_autocast(self):
        """Weights and anchors stay in float32, so the pull is exact whatever the precision of the forward pass."""
        ours, theirs = adapted(), adapted()
        a = ours.optimizer(torch.optim.SGD, lr=0.05)
        b = theirs.optimizer(torch.optim.SGD, lr=0.05, pull=False)
        for adaptation, optimizer, extra in ((ours, a, 0), (theirs, b, 1)):
            for _ in range(3):
                optimizer.zero_grad()
                with torch.autocast("cpu", torch.bfloat16):
                    loss = loss_of(adaptation)
                (loss + extra * adaptation.penalty()).backward()
                optimizer.step()
        close(weights(ours), weights(theirs))

    @pytest.mark.parametrize("strategy", [COUPLED, DECOUPLED], ids=["coupled", "decoupled"])
    @pytest.mark.parametrize(("cls", "fused"), FUSED)
    @pytest.mark.parametrize("pulled", [False, True], ids=["in the step", "pull()"])
    @pytest.mark.parametrize("to_none", [False, True], ids=["zeroed", "set to none"])
    def test_nothing_moves_in_a_step_that_overflows(self, strategy, cls, fused, pulled, to_none):
        """The next step has the pull once, with or without another pull()."""
        ours, theirs = adapted(strategy), adapted(strategy)
        a = ours.optimizer(cls, lr=0.05, fused=fused)
        b = theirs.optimizer(cls, lr=0.05)
        scaler = GradScaler("cpu", init_scale=1024.0)
        start = weights(ours)
        for overflow, again in ((True, False), (True, True), (False, True), (True, True), (False, False)):
            before = weights(ours)
            a.zero_grad(set_to_none=to_none)
            scaler.scale(loss_of(ours)).backward()
            if overflow:
                ours.model[2].weight.grad[0, 0] = torch.inf
            if pulled and (again or overflow):
                ours.pull(scaler)
            scaler.step(a)
            scaler.update()
            if overflow:
                assert torch.equal(weights(ours), before)
                continue
            b.zero_grad()
            loss_of(theirs).backward()
            b.step()
            close(weights(ours), weights(theirs))
        assert not torch.equal(weights(ours), start)

    @pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.AdamW])
    @pytest.mark.parametrize("by", ["position", "keyword"])
    def test_a_step_with_a_closure(self, cls, by):
        """The closure computes new gradients, and the pull follows its backward."""
        adaptation = adapted()
        optimizer = adaptation.optimizer(cls, lr=0.05)

        def closure():
            optimizer.zero_grad()
            loss = loss_of(adaptation)
            loss.backward()
            return loss

        for _ in range(4):
            loss = optimizer.step(closure) if by == "position" else optimizer.step(closure=closure)
        close(weights(adaptation), reference(cls))
        assert loss.item() > 0

    @pytest.mark.parametrize("scaled", [False, True], ids=["plain", "GradScaler"])
    @pytest.mark.parametrize(("cls", "fused"), FUSED)
    def test_parameters_without_a_gradient_are_pulled_too(self, cls, fused, scaled):
        """Like autograd for a penalty in the loss."""
        ours, theirs = (adapted(model=Unused()) for _ in range(2))
        a = ours.optimizer(cls, lr=0.05, fused=fused)
        b = theirs.optimizer(cls, lr=0.05, pull=False)
        scaler = GradScaler("cpu", enabled=scaled)
        for _ in range(3):
            a.zero_grad()
            scaler.scale(loss_of(ours)).backward()
            scaler.step(a)
            scaler.update()
            b.zero_grad()
            (loss_of(theirs) + theirs.penalty()).backward()
            b.step()
        assert not torch.equal(ours.model.aside.weight, adapted(model=Unused()).model.aside.weight)
        close(weights(ours), weights(theirs))

    def test_maximize(self):
        """The pull lowers the penalty, also if the optimizer maximizes."""
        adaptation = adapted(fresh=())
        optimizer = adaptation.optimizer(torch.optim.SGD, lr=0.1, maximize=True)
        before = adaptation.penalty().item()
        (0 * loss_of(adaptation)).backward()
        optimizer.step()
        assert adaptation.penalty().item() == pytest.approx(before * (1 - 0.1 * 0.5) ** 2, rel=1e-4)

    def test_twice_is_once(self):
        """pull() is never counted twice: not by calling it again, not by micro-batches, not by the step."""
        ours, theirs = adapted(), adapted()
        a, b = (one.optimizer(torch.optim.SGD, lr=0.05) for one in (ours, theirs))
        for _ in range(3):
            a.zero_grad()
            for half in (slice(0, 4), slice(4, 8)):
                (loss_of(ours, half) / 2).backward()
                ours.pull()
                ours.pull()
            a.step()
            b.zero_grad()
            loss_of(theirs).backward()
            b.step()
        close(weights(ours), weights(theirs))

    def test_pull_false_leaves_it_to_the_loss(self):
        adaptation, plain = adapted(), adapted(None)
        a = adaptation.optimizer(torch.optim.SGD, lr=0.05, pull=False)
        b = plain.optimizer(torch.optim.SGD, lr=0.05)
        for one, optimizer in ((adaptation, a), (plain, b)):
            loss_of(one).backward()
            one.pull()
            optimizer.step()
        assert torch.equal(weights(adaptation), weights(plain))

    def test_pull_needs_an_optimizer(self):
        with pytest.raises(ctl.SpecError, match="make that optimizer first"):
            adapted().pull()

    def test_sparse_gradients_become_dense(self):
        """Like autograd for the sum of a sparse gradient and that of the penalty."""
        model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Flatten(), nn.Linear(6, 2))
        adaptation = adapted(model=model, fresh=())
        optimizer = adaptation.optimizer(torch.optim.SGD, lr=0.1)
        before, anchor = model[0].weight.detach().clone(), random_weights(model, 1)["0.weight"]
        model(torch.tensor([[0, 1]])).sum().backward()
        optimizer.step()
        expected = before[2:] - 0.1 * 0.5 * (before[2:] - anchor[2:])
        torch.testing.assert_close(model[0].weight[2:].detach(), expected)


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.aside = nn.Linear(3, 4)
        self.body = nn.Linear(3, 6)
        self.register_module("4", nn.Linear(6, 2))

    def forward(self, x):
        return getattr(self, "4")(self.body(x).tanh())


class TestDecoupled:
    @pytest.mark.parametrize("scaled", [False, True], ids=["plain", "GradScaler"])
    @pytest.mark.parametrize(("cls", "fused"), FUSED)
    def test_same_whatever_scales(self, cls, fused, scaled):
        ours, theirs = adapted(DECOUPLED), adapted(DECOUPLED)
        a = ours.optimizer(cls, lr=0.05, fused=fused)
        b = theirs.optimizer(cls, lr=0.05)
        scaler = GradScaler("cpu", enabled=scaled)
        for _ in range(3):
            a.zero_grad()
            scaler.scale(loss_of(ours)).backward()
            ours.pull(scaler)
            scaler.step(a)
            scaler.update()
            b.zero_grad()
            loss_of(theirs).backward()
            b.step()
        close(weights(ours), weights(theirs))

    def test_equal_to_coupled_under_plain_sgd_only(self):
        found = {}
        for cls in (torch.optim.SGD, torch.optim.AdamW):
            for strategy in (COUPLED, DECOUPLED):
                adaptation = adapted(strategy)
                optimizer = adaptation.optimizer(cls, lr=0.05)
                for _ in range(3):
                    optimizer.zero_grad()
                    loss_of(adaptation).backward()
                    optimizer.step()
                found[cls, strategy.mode] = weights(adaptation)
        close(found[torch.optim.SGD, "coupled"], found[torch.optim.SGD, "decoupled"])
        difference = found[torch.optim.AdamW, "coupled"] - found[torch.optim.AdamW, "decoupled"]
        assert difference.abs().max() > 0.01

    def test_follows_the_schedule(self):
        """A rate of 0 moves nothing, the pull's step included."""
        adaptation = adapted(DECOUPLED)
        optimizer = adaptation.optimizer(torch.optim.SGD, lr=0.05)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step > 0))
        before = weights(adaptation)
        for moves in (False, True):
            loss_of(adaptation).backward()
            optimizer.step()
            schedule.step()
            assert (not torch.equal(weights(adaptation), before)) is moves


class TestRates:
    def test_real_rates_that_any_scheduler_sees(self):
        """timm stores a scale that only its own schedulers apply."""
        model = network()
        adaptation = ctl.adapt(model, random_weights(model, 1), [ctl.DiscriminativeLR(decay=0.5)])
        optimizer = adaptation.optimizer(torch.optim.Adam, lr=0.1)  # AdamW has groups without weight decay beside
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.025, 0.05, 0.1])
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.1)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.0025, 0.005, 0.01])
        assert schedule.base_lrs == pytest.approx([0.025, 0.05, 0.1])

    def test_a_phase_multiplies_every_rate(self):
        model = network()
        strategies = [ctl.DiscriminativeLR(decay=0.5), ctl.GradualUnfreezing(scales=(1.0, 0.25))]
        adaptation = ctl.adapt(model, random_weights(model, 1), strategies)
        optimizer = adaptation.optimizer(torch.optim.SGD, lr=0.1)
        for phase, scale in ((0, 1.0), (1, 0.25), (1, 0.25), (0, 1.0)):
            adaptation.start_phase(phase)
            for key in ("lr", "initial_lr"):
                assert [g[key] for g in optimizer.param_groups] == pytest.approx(
                    [0.025 * scale, 0.05 * scale, 0.1 * scale]
                )

    def test_weight_decay_stays_off_what_is_pulled(self):
        """AdamW's default is 0.01: two pulls, to zero and to the source. Biases are not decayed unless asked for."""
        model = network()
        adaptation = ctl.adapt(model, random_weights(model, 1), [ctl.L2SP(alpha=0.0)], fresh=["4"])
        optimizer = adaptation.optimizer(torch.optim.AdamW, lr=0.1)
        decay = {name: g["weight_decay"] for g in optimizer.param_groups for name in g["param_names"]}
        assert decay == {f"{i}.{kind}": 0 for i in (0, 2, 4) for kind in ("weight", "bias")}
        asked = [ctl.L2SP(alpha=0.0), ctl.DiscriminativeLR(decay=1.0, decay_biases_and_norms=True)]
        optimizer = ctl.adapt(network(), random_weights(model, 1), asked, fresh=["4"]).optimizer(torch.optim.AdamW)
        decay = {name: g["weight_decay"] for g in optimizer.param_groups for name in g["param_names"]}
        assert decay == {
            f"{i}.{kind}": 0 if kind == "weight" else 0.01 for i in (0, 2, 4) for kind in ("weight", "bias")
        }

    @pytest.mark.parametrize("how", ["option", "partial"])
    def test_weight_decay_asked_for_on_what_is_pulled_is_refused(self, how):
        adaptation = adapted()
        cls = functools.partial(torch.optim.AdamW, weight_decay=0.1) if how == "partial" else torch.optim.AdamW
        options = {} if how == "partial" else {"weight_decay": 0.1}
        with pytest.raises(ctl.SpecError, match=r"weight_decay=0\.1.*'0\.weight'"):
            adaptation.optimizer(cls, lr=0.1, **options)
        adaptation.optimizer(torch.optim.AdamW, lr=0.1, weight_decay=0.0)
        adapted(None).optimizer(cls, lr=0.1, **options)

    def test_a_rate_for_everything_gives_way_to_freezing(self):
        model = network()
        strategies = [ctl.DiscriminativeLR(decay=0.5), ctl.LayerTransfer(layers=1)]
        adaptation = ctl.adapt(model, random_weights(model, 1), strategies)
        optimizer = adaptation.optimizer(torch.optim.SGD, lr=0.1)
        assert not model[0].weight.requires_grad
        assert "0.weight" not in [name for g in optimizer.param_groups for name in g["param_names"]]


class TestRefused:
    @pytest.mark.parametrize(
        ("cls", "message"),
        [
            (torch.optim.LBFGS, "LBFGS takes no parameter groups"),
            (torch.optim.SparseAdam, "sparse gradients"),
            (functools.partial(torch.optim.LBFGS, history_size=3), "no parameter groups"),
        ],
    )
    def test_optimizers_that_cannot(self, cls, message):
        with pytest.raises(ctl.SpecError, match=message):
            adapted().optimizer(cls, lr=0.1)

    @pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
    def test_muon_takes_matrices_only(self):
        with pytest.raises(ctl.SpecError, match=r"Muon takes matrices only, but '0\.bias'"):
            adapted().optimizer(torch.optim.Muon, lr=0.1)
        model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False))
        adaptation = adapted(ctl.L2SP(alpha=1.0), model=model, fresh=())
        optimizer = adaptation.optimizer(torch.optim.Muon, lr=0.01, weight_decay=0.0)
        loss_of(adaptation).backward()
        optimizer.step()

    def test_nothing_to_train(self):
        model = network()
        adaptation = ctl.adapt(model, random_weights(model, 1), [ctl.LayerTransfer(layers=3)])
        with pytest.raises(ctl.SpecError, match="freezes every parameter"):
            adaptation.optimizer(torch.optim.SGD, lr=0.1)

    def test_an_optimizer_without_a_rate_of_its_own(self):
        class Own(torch.optim.SGD):
            def __init__(self, params, lr):
                super().__init__(params, lr)

        with pytest.raises(ctl.SpecError, match="Pass lr="):
            adapted().optimizer(Own)
        adapted().optimizer(Own, lr=0.1)

    def test_half_precision_parameters(self):
        """A pull of 1e-4 moves 0.3 % of bfloat16 entries."""
        model = network().to(torch.bfloat16)
        adaptation = ctl.adapt(model, random_weights(model, 1), [COUPLED])
        with pytest.raises(ctl.SpecError, match=r"'0\.weight' is torch.bfloat16.*autocast"):
            adaptation.optimizer(torch.optim.SGD, lr=0.1)

    def test_a_decoupled_pull_that_overshoots(self):
        strategy = ctl.L2SP(alpha=3.0, mode="decoupled")
        with pytest.raises(ctl.SpecError, match="overshoots"):
            adapted(strategy).optimizer(torch.optim.SGD, lr=0.5)
        adapted(strategy).optimizer(torch.optim.SGD, lr=0.3)
        model = network()
        later = [strategy, ctl.GradualUnfreezing(scales=(1.0, 2.0))]
        with pytest.raises(ctl.SpecError, match="overshoots"):
            ctl.adapt(model, random_weights(model, 1), later).optimizer(torch.optim.SGD, lr=0.3)

    def test_what_is_handed_in(self):
        model = network()
        with pytest.raises(ctl.SpecError, match="model must be"):
            ctl.adapt("resnet", {}, [])
        with pytest.raises(ctl.SpecError, match=r"L2SP\(alpha=0.1\); received 'l2_sp'"):
            ctl.adapt(model, model.state_dict(), ["l2_sp"])
        with pytest.raises(ctl.SpecError, match=r"strategies\.0: 'l2_ps' is none of"):
            ctl.adapt(model, model.state_dict(), [{"kind": "l2_ps"}])
        with pytest.raises(ctl.SelectorError, match=r"fresh: 'headd'"):
            ctl.adapt(model, model.state_dict(), fresh=["headd"])
        with pytest.raises(ctl.SpecError, match=r"phase must be one of 0 to 0; received 1"):
            adapted().start_phase(1)

    def test_a_dictionary_is_a_strategy(self):
        model = network()
        adaptation = ctl.adapt(model, model.state_dict(), [{"kind": "l2_sp", "alpha": 0.25}])
        assert adaptation.plan["0.weight"].pull == 0.25


class TestPenalty:
    def test_by_hand(self):
        """alpha/2 |w - w0|^2 + beta/2 |w|^2, sums, the 1/2 kept; only what is trained now."""
        model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
        source = {"0.weight": torch.zeros(2, 2)}
        adaptation = ctl.adapt(model, source, [ctl.L2SP(alpha=0.5, beta=0.1)])
        with torch.no_grad():
            model[0].weight.copy_(torch.tensor([[1.0, 2.0], [0.0, 2.0]]))
            model[1].weight.copy_(torch.tensor([[3.0, 1.0]]))
        assert adaptation.penalty().item() == pytest.approx(0.25 * 9 + 0.05 * 10)

    def test_is_over_what_is_trained_now(self):
        """A parameter trained in one phase and frozen in the next adds nothing: its gradient would be dropped."""
        model = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Linear(1, 1, bias=False))
        stages = [ctl.Stage(epochs=1), ctl.Stage(train=["1"], epochs=1), ctl.Stage(train=["0"])]
        strategies = [ctl.L2SP(alpha=0.5, beta=0.1), ctl.GradualUnfreezing(phases=stages)]
        adaptation = ctl.adapt(model, {"0.weight": torch.zeros(1, 2)}, strategies)
        nn.init.ones_(model[0].weight)
        nn.init.ones_(model[1].weight)
        for phase, expected in enumerate([0.25 * 2 + 0.05, 0.05, 0.25 * 2]):
            adaptation.start_phase(phase)
            assert adaptation.penalty().item() == pytest.approx(expected)

    def test_without_a_pull(self):
        penalty = adapted(None).penalty()
        assert penalty.shape == ()
        assert penalty.item() == 0

    def test_source_of_another_shape_is_not_broadcast(self):
        """tllib subtracts (3, 4) from (1, 4) and returns a number; an extra layer is a bare KeyError there."""
        model = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 1), nn.Linear(1, 2))
        source = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 3)).state_dict()
        before = model[1].weight.detach().clone()
        adaptation = ctl.adapt(model, source, [ctl.L2SP(alpha=1.0, beta=0.0)])
        assert torch.equal(model[1].weight, before)
        assert adaptation.transfer.fresh["1.weight"] == "shape differs: (1, 4) here, (3, 4) in the source"
        assert adaptation.transfer.fresh["2.weight"] == "missing in the source"
        assert adaptation.penalty().item() == 0

    def test_tied_parameters_count_once(self):
        model = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
        model["b"].weight = model["a"].weight
        adaptation = ctl.adapt(model, {"a.weight": torch.zeros(2, 2)}, [ctl.L2SP(alpha=2.0)])
        with torch.no_grad():
            model["a"].weight.fill_(1.0)
        assert adaptation.penalty().item() == 4.0
        optimizer = adaptation.optimizer(torch.optim.SGD, lr=0.1)
        optimizer.step()
        torch.testing.assert_close(model["a"].weight.detach(), torch.full((2, 2), 0.8))


class TestDrift:
    def test_by_hand(self):
        model = nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 1), nn.Linear(1, 1))
        source = {"0.weight": torch.tensor([[3.0, 0.0]]), "0.bias": torch.tensor([4.0]), "1.weight": torch.zeros(1, 1)}
        source["1.bias"] = torch.zeros(1)
        adaptation = ctl.adapt(model, source)
        with torch.no_grad():
            model[0].bias.add_(2.0)
        assert adaptation.drift() == {"0": pytest.approx(0.4), "1": 0.0}
        with torch.no_grad():
            model[1].bias.add_(2.0)
        assert adaptation.drift()["1"] == 1.0  # |w0| is 0: moved or not


class TestFreezing:
    def batch_norm(self):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False), nn.Linear(4, 2)
        )

    def test_train_and_eval_agree_in_frozen_layers(self):
        """requires_grad=False alone leaves them 5.2 apart, track_running_stats=False 7.7."""
        model = self.batch_norm()
        adaptation = ctl.adapt(model, random_weights(model, 3), [ctl.LayerTransfer(layers=2)])
        x = torch.randn(16, 3) * 5
        for _ in range(3):
            model.train()
            trained = model[:4](x)
            model.eval()
            assert torch.equal(trained, model[:4](x))
        assert not any(model[i].training for i in (1, 3))
        assert model.train()[4].training
        assert adaptation.frozen

    def test_a_norm_without_parameters_goes_with_its_layer(self):
        model = self.batch_norm()
        start = random_weights(model, 3)
        adaptation = ctl.adapt(model, start, [ctl.GradualUnfreezing(by="layer")])
        seen = []
        for phase in range(3):
            adaptation.start_phase(phase)
            model.train()
            before = model[3].running_mean.clone()
            model(torch.randn(16, 3))
            seen.append(not torch.equal(before, model[3].running_mean))
        assert seen == [False, True, True]

    def test_a_freed_norm_takes_the_models_mode(self):
        model = self.batch_norm()
        adaptation = ctl.adapt(model, random_weights(model, 3), [ctl.GradualUnfreezing()])
        model.eval()
        adaptation.start_phase(1)
        assert not model[1].training
        model.train()
        assert model[1].training
        adaptation.start_phase(0)
        assert not model[1].training

    def test_gradients_of_what_is_frozen_are_dropped(self):
        model = self.batch_norm()
        adaptation = ctl.adapt(model, random_weights(model, 3), [ctl.GradualUnfreezing()])
        adaptation.start_phase(1)
        loss_of(adaptation).backward()
        assert model[0].weight.grad is not None
        adaptation.start_phase(0)
        assert model[0].weight.grad is None
        assert not model[0].weight.requires_grad

    def test_keep_frozen_after_something_else_has_touched_it(self):
        model = self.batch_norm()
        adaptation = ctl.adapt(model, random_weights(model, 3), [ctl.LayerTransfer(layers=1)])
        model.requires_grad_(True)
        model[1].training = True
        adaptation.keep_frozen()
        assert not model[0].weight.requires_grad
        assert not model[1].training

    def test_unfreezing_goes_by_name_not_by_value(self):
        """Lightning compares parameters by value and drops equal ones."""
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
        nn.init.ones_(model[0].weight)
        nn.init.ones_(model[1].weight)
        adaptation = ctl.adapt(model, {k: torch.ones(v.shape) for k, v in model.state_dict().items()})
        optimizer = adaptation.optimizer(torch.optim.SGD, lr=0.1)
        assert sum(len(group["params"]) for group in optimizer.param_groups) == 6


class TestState:
    def two_phases(self):
        torch.manual_seed(0)
        model = network()
        strategies = [COUPLED, ctl.GradualUnfreezing(scales=(1.0, 0.5))]
        return ctl.adapt(model, random_weights(model, 1), strategies)

    @pytest.mark.parametrize("order", ["adaptation first", "optimizer first", "optimizer made last"])
    def test_resumes_where_it_was(self, order):
        """Rates too, whichever is loaded first; Lightning freezes again, composer cannot resume at all."""
        ours = self.two_phases()
        a = ours.optimizer(torch.optim.AdamW, lr=0.1)
        ours.start_phase(1)
        loss_of(ours).backward()
        a.step()
        state = ours.state_dict()
        made, tensors = copy.deepcopy((a.state_dict(), ours.model.state_dict()))

        twin = self.two_phases()
        twin.model.load_state_dict(tensors)
        if order == "optimizer made last":
            twin.load_state_dict(state)
            b = twin.optimizer(torch.optim.AdamW, lr=0.1)
            b.load_state_dict(made)
        else:
            b = twin.optimizer(torch.optim.AdamW, lr=0.1)
            for load in (twin.load_state_dict, b.load_state_dict)[:: 1 if order == "adaptation first" else -1]:
                load(state if load == twin.load_state_dict else made)
        assert twin.phase == 1
        assert twin.model[0].weight.requires_grad
        assert [g["lr"] for g in b.param_groups] == [g["lr"] for g in a.param_groups] == [0.05]
        for one, optimizer in ((ours, a), (twin, b)):
            optimizer.zero_grad()
            loss_of(one).backward()
            optimizer.step()
        assert torch.equal(weights(ours), weights(twin))

    def test_of_another_plan(self):
        with pytest.raises(ctl.PlanError, match="another plan: its phases differs"):
            ctl.adapt(network(), network().state_dict(), [COUPLED]).load_state_dict(self.two_phases().state_dict())
        with pytest.raises(ctl.PlanError, match=r"'0\.weight' differs"):
            ctl.adapt(network(), network().state_dict()).load_state_dict(adapted().state_dict())

    @pytest.mark.parametrize(
        ("here", "saved", "said"),
        [
            ([ctl.L2SP(alpha=2)], [ctl.L2SP()], r"'0\.weight' differs: pull is 0\.1 in the state and 2\.0 here"),
            ([], [ctl.LoRA(rank=2)], r"'0\.lora_\w+' differs: the state alone has it"),
            ([ctl.LoRA(rank=2)], [], r"'0\.lora_\w+' differs: this adaptation alone has it"),
            ([ctl.Mixout(p=0.7)], [ctl.Mixout(p=0.9)], r"its updates differs: p is 0\.9 in the state and 0\.7 here"),
        ],
    )  # fmt: skip
    def test_of_another_plan_with_both_values(self, here, saved, said):
        state = ctl.adapt(network(), network().state_dict(), saved).state_dict()
        with pytest.raises(ctl.PlanError, match=said):
            ctl.adapt(network(), network().state_dict(), here).load_state_dict(state)

    def test_of_a_plan_that_explains_itself_in_other_words(self):
        """Version 0.1.0 said "not asked for" of a parameter that is declared fresh."""
        ours, twin = adapted(off=0.3), adapted(off=0.3)
        assert ours.plan["4.weight"].reason == "declared fresh by fresh=['4']"
        state = ours.state_dict()
        for row in state["plan"]["rows"]:
            row["reason"] = row["reason"] and "not asked for"
        twin.load_state_dict(state)
        assert twin.plan == ours.plan
        state["plan"]["rows"][0]["scale"] = 0.5
        with pytest.raises(ctl.PlanError, match=r"another plan: '0\.weight' differs"):
            twin.load_state_dict(state)

    @pytest.mark.parametrize("broken", ["no plan", "another type", "an anchor less", "an anchor of another shape"])
    def test_of_nothing_of_ours(self, broken):
        ours = self.two_phases()
        state = ours.state_dict()
        if broken == "no plan":
            del state["plan"]
        elif broken == "another type":
            state["plan"] = {"rows": 3}
        elif broken == "an anchor less":
            del state["start"]["0.weight"]
        else:
            state["start"]["0.weight"] = torch.zeros(1)
        with pytest.raises(ctl.PlanError, match=r"Load what state_dict\(\) gave"):
            ours.load_state_dict(state)

    def test_does_not_change_with_the_model(self):
        adaptation = adapted(off=0.0)
        state = adaptation.state_dict()
        kept = {name: tensor.clone() for name, tensor in state["start"].items()}
        with torch.no_grad():
            adaptation.model[0].weight.add_(1.0)
        assert all(torch.equal(kept[name], tensor) for name, tensor in state["start"].items())

    @pytest.mark.parametrize(
        "how", [copy.deepcopy, lambda a: pickle.loads(pickle.dumps(a))], ids=["deepcopy", "pickle"]
    )
    def test_a_copy_pulls_with_an_optimizer_of_its_own(self, how):
        """Copying an optimizer drops its hooks in silence; so a copy has none until it makes one."""
        ours = adapted()
        ours.optimizer(torch.optim.SGD, lr=0.05)
        twin = how(ours)
        with pytest.raises(ctl.SpecError, match="make that optimizer first"):
            twin.pull()
        optimizer = twin.optimizer(torch.optim.SGD, lr=0.05)
        for _ in range(4):
            optimizer.zero_grad()
            loss_of(twin).backward()
            optimizer.step()
        close(weights(twin), reference(torch.optim.SGD))
        assert torch.equal(weights(ours), weights(adapted()))

    def test_repr_and_str(self):
        assert repr(adapted()) == "<Adaptation of Sequential: 80 of 80 trained>"


class TestModelIsTheSource:
    def test_fresh_is_initialised_anew(self):
        """The layer's values at the call of adapt are the source here."""
        model = network()
        source = random_weights(model, 1)
        model.load_state_dict(source)
        adaptation = ctl.adapt(model, model, [ctl.LayerTransfer(layers=1, rest="fresh")])
        assert torch.equal(model[0].weight, source["0.weight"])
        assert not torch.equal(model[2].weight, source["2.weight"])
        assert not torch.equal(model[4].bias, source["4.bias"])
        assert adaptation.drift() == {"0": 0.0}

    def test_a_copy_of_the_source_too(self):
        source = network()
        model = copy.deepcopy(source)
        ctl.adapt(model, source, [ctl.FeatureExtraction()])
        assert torch.equal(model[2].weight, source[2].weight)
        assert not torch.equal(model[4].weight, source[4].weight)
        assert model[4].weight.requires_grad
        assert not model[2].weight.requires_grad
