"""Penalties in a step: values by hand, and everything that their authors need not think of."""

from __future__ import annotations

from typing import ClassVar, Literal

import pytest
import torch
from torch import nn
from torch.amp import GradScaler

import conservtl as ctl
from conservtl.kernels import chunks as module
from conservtl.plan import Penalty, Update
from conservtl.runtime import param_groups

CORNER = 0.5


class Huber(Penalty):
    """2 × Huber(w - w0) with a corner at 0.5, by its value alone."""

    kind: Literal["runner_huber"] = "runner_huber"

    def describe(self):
        return "a Huber penalty"

    def value(self, moving):
        return 2 * sum(
            nn.functional.huber_loss(item.parameter, item.anchor, reduction="sum", delta=CORNER) for item in moving
        )


class Elementwise(Huber):
    """The same, in parts."""

    kind: Literal["runner_elementwise"] = "runner_elementwise"
    sums_over: ClassVar[str] = "elements"


class Norm(Penalty):
    """The norm of all differences together: no sum over parameters."""

    kind: Literal["runner_norm"] = "runner_norm"

    def describe(self):
        return "a norm"

    def value(self, moving):
        return sum((item.parameter - item.anchor).square().sum() for item in moving).sqrt()


class Weighed(Penalty):
    """The sum of F |w - w0|."""

    kind: Literal["runner_weighed"] = "runner_weighed"
    reads: tuple[str, ...] = ("fisher",)

    def describe(self):
        return "a weighed penalty"

    def value(self, moving):
        return sum((item.measured["fisher"] * (item.parameter - item.anchor).abs()).sum() for item in moving)


class Wrong(Huber):
    kind: Literal["runner_wrong"] = "runner_wrong"
    returns: str

    def value(self, moving):
        return {"vector": moving[0].parameter, "number": 1.0, "constant": torch.ones(())}[self.returns]


class WrongGradient(Huber):
    kind: Literal["runner_wrong_gradient"] = "runner_wrong_gradient"

    def gradient(self, moving):
        return [item.parameter[:1] for item in moving]


class Penalised(ctl.Strategy):
    """Puts a penalty on all that came from the source into the plan."""

    kind: Literal["runner_penalised"] = "runner_penalised"
    penalty: dict
    """Its fields but for names and author."""

    def apply(self, plan):
        names = tuple(row.name for row in plan.rows if row.origin == "source")
        return plan.with_penalty(Penalty.model_validate({"by": self.label, "names": names, **self.penalty}))


def penalised(kind="runner_huber", **fields):
    return Penalised(penalty={"kind": kind, **fields})


def adapted(*strategies, off=(0.25, -3.0), model=None):
    """Two weights, one this side of the corner and one beyond it; a bias that has not moved."""
    model = nn.Linear(2, 1) if model is None else model
    source = {name: torch.zeros(tensor.shape) for name, tensor in model.state_dict().items()}
    adaptation = ctl.adapt(model, source, strategies)
    with torch.no_grad():
        model.weight.copy_(torch.tensor(off).expand_as(model.weight))
    return adaptation


def step(adaptation, optimizer=None, gradient=0.0, **options):
    """One step of SGD on a constant gradient of the weight: where it is then."""
    optimizer = optimizer or adaptation.optimizer(torch.optim.SGD, lr=0.1, **options)
    adaptation.model.weight.grad = None if gradient is None else torch.full_like(adaptation.model.weight, gradient)
    optimizer.step()
    return adaptation.model.weight.detach().flatten().tolist()


EXPECTED = [0.25 - 0.1 * 2 * 0.25, -3 + 0.1 * 2 * CORNER]


@pytest.mark.parametrize("kind", ["runner_huber", "runner_elementwise"])
@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
@pytest.mark.parametrize("anchor", ["fp32", "bf16", "cpu"])
@pytest.mark.parametrize("gradient", [None, 0.0])
def test_a_step_by_hand(kind, mode, anchor, gradient):
    adaptation = adapted(penalised(kind, mode=mode, anchor=anchor))
    assert step(adaptation, gradient=gradient) == pytest.approx(EXPECTED)
    assert not adaptation.model.bias.any()


@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
def test_up_and_down(mode):
    """Maximising goes up the loss, and still toward the source."""
    adaptation = adapted(penalised(mode=mode))
    assert step(adaptation, maximize=True) == pytest.approx(EXPECTED)


def test_decoupled_leaves_the_gradient_alone():
    adaptation = adapted(penalised(mode="decoupled"))
    step(adaptation)
    assert not adaptation.model.weight.grad.any()


@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
def test_a_loss_scale(mode):
    """Divided out before the step, or inside it."""
    for fused in (False, True):
        adaptation = adapted(penalised(mode=mode))
        optimizer = adaptation.optimizer(torch.optim.SGD, lr=0.1, fused=fused)
        if fused:
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(512.0), torch.tensor(0.0)
            assert step(adaptation, optimizer) == pytest.approx(EXPECTED)
        else:
            scaler = GradScaler("cpu", init_scale=512.0)
            scaler.scale(0 * adaptation.model.weight.sum()).backward()
            scaler.step(optimizer)
            assert adaptation.model.weight.detach().flatten().tolist() == pytest.approx(EXPECTED)


@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
def test_a_skipped_step_moves_nothing(mode):
    adaptation = adapted(penalised(mode=mode))
    optimizer = adaptation.optimizer(torch.optim.SGD, lr=0.1, fused=True)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(512.0), torch.tensor(1.0)
    assert step(adaptation, optimizer) == [0.25, -3.0]


def test_once_whether_it_is_added_before_clipping_or_not():
    adaptation = adapted(penalised())
    optimizer = adaptation.optimizer(torch.optim.SGD, lr=0.1)
    for _ in range(2):
        adaptation.pull()
    torch.nn.utils.clip_grad_norm_(adaptation.model.parameters(), 0.5)
    gradient = adaptation.model.weight.grad.clone()
    expected = torch.tensor([[2 * 0.25, -2 * CORNER]])
    torch.testing.assert_close(gradient, 0.5 * expected / expected.norm())
    optimizer.step()
    torch.testing.assert_close(adaptation.model.weight.detach(), torch.tensor([[0.25, -3.0]]) - 0.1 * gradient)


def test_a_closure():
    adaptation = adapted(penalised())
    optimizer = adaptation.optimizer(torch.optim.SGD, lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = 0 * adaptation.model.weight.sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert adaptation.model.weight.detach().flatten().tolist() == pytest.approx(EXPECTED)


@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
def test_annealed_over_steps(mode):
    """1, then a half, then nothing."""
    anneal = {"steps": 2}
    adaptation = adapted(penalised(mode=mode, anneal=anneal), off=(3.0, -3.0))
    optimizer = adaptation.optimizer(torch.optim.SGD, lr=0.1)
    for expected, factor in ((2.9, 1.0), (2.85, 0.5), (2.85, 0.0)):
        value = 2 * factor * 2 * CORNER * (abs(adaptation.model.weight[0, 0].item()) - CORNER / 2)
        assert adaptation.penalty().item() == pytest.approx(value, rel=1e-5)
        assert step(adaptation, optimizer) == pytest.approx([expected, -expected])


def test_the_value_is_differentiable_and_can_stand_in_the_loss():
    adaptation = adapted(penalised())
    optimizer = adaptation.optimizer(torch.optim.SGD, lr=0.1, pull=False)
    value = adaptation.penalty()
    assert value.item() == pytest.approx(2 * (0.25**2 / 2 + CORNER * (3 - CORNER / 2)))
    value.backward()
    optimizer.step()
    assert adaptation.model.weight.detach().flatten().tolist() == pytest.approx(EXPECTED)


def test_values_are_summed_over_penalties():
    adaptation = adapted(ctl.L2SP(alpha=0.5), penalised())
    alone = adapted(penalised()).penalty().item()
    assert adaptation.penalty().item() == pytest.approx(alone + 0.25 * (0.25**2 + 9))
    expected = [a - 0.1 * 0.5 * w for a, w in zip(EXPECTED, (0.25, -3.0), strict=True)]
    assert step(adaptation) == pytest.approx(expected)


class TestParts:
    def three(self, kind):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
        source = {name: torch.zeros(tensor.shape) for name, tensor in model.state_dict().items()}
        adaptation = ctl.adapt(model, source, [penalised(kind)])
        torch.manual_seed(0)
        for parameter in model.parameters():
            nn.init.normal_(parameter)
        return adaptation

    def seen(self, kind, monkeypatch):
        """How many parameters each call of value() is handed, with room for one weight at a time."""
        monkeypatch.setitem(module._CHUNK, "cpu", 20)
        adaptation, sizes = self.three(kind), []
        cls = type(adaptation.plan.penalties[0])
        value = cls.value
        monkeypatch.setattr(cls, "value", lambda penalty, moving: sizes.append(len(moving)) or value(penalty, moving))
        adaptation.optimizer(torch.optim.SGD, lr=0.1).step()
        return sizes

    def test_a_sum_is_taken_in_runs(self, monkeypatch):
        """The difference never stands in memory for the whole model."""
        assert self.seen("runner_elementwise", monkeypatch) == [2, 2, 2]

    def test_anything_else_sees_all_at_once(self, monkeypatch):
        assert self.seen("runner_huber", monkeypatch) == [6]
        assert self.seen("runner_norm", monkeypatch) == [6]

    def test_a_norm_of_everything_is_that_of_everything(self, monkeypatch):
        monkeypatch.setitem(module._CHUNK, "cpu", 20)
        adaptation = self.three("runner_norm")
        before = {name: p.detach().clone() for name, p in adaptation.model.named_parameters()}
        norm = torch.cat([tensor.flatten() for tensor in before.values()]).norm()
        adaptation.optimizer(torch.optim.SGD, lr=0.1).step()
        for name, parameter in adaptation.model.named_parameters():
            torch.testing.assert_close(parameter.detach(), before[name] - 0.1 * before[name] / norm)


def test_a_gradient_that_is_sparse():
    model = nn.Embedding(3, 2, sparse=True)
    adaptation = ctl.adapt(model, {"weight": torch.zeros(3, 2)}, [penalised()])
    nn.init.constant_(model.weight, 0.25)
    optimizer = adaptation.optimizer(torch.optim.SGD, lr=0.1)
    model(torch.tensor([1])).sum().backward()
    assert model.weight.grad.is_sparse
    optimizer.step()
    expected = torch.full((3, 2), 0.25 - 0.1 * 0.5)
    expected[1] -= 0.1
    torch.testing.assert_close(model.weight.detach(), expected)


def test_frozen_parameters_are_left_out():
    adaptation = adapted(penalised(), ctl.GradualUnfreezing(phases=[ctl.Stage(train=["bias"])]))
    assert adaptation.penalty().item() == 0
    adaptation.optimizer(torch.optim.SGD, lr=0.1).step()
    assert adaptation.model.weight.flatten().tolist() == [0.25, -3.0]


def test_what_it_reads_is_handed_over_and_must_be_measured():
    class Both(Penalised):
        kind: Literal["runner_both"] = "runner_both"

        def apply(self, plan):
            return super().apply(ctl.FisherSP(alpha=0.0).apply(plan))

    adaptation = adapted(Both(penalty={"kind": "runner_weighed", "names": ("weight",)}))
    with pytest.raises(ctl.SpecError, match="FisherSP needs a measurement first"):
        adaptation.penalty()
    adaptation.use_measured("fisher", {"weight": torch.tensor([[2.0, 3.0]])})
    assert step(adaptation) == pytest.approx([0.25 - 0.1 * 2, -3 + 0.1 * 3])


class TestRefused:
    def test_weight_decay_beside_it(self):
        with pytest.raises(ctl.SpecError, match=r"weight_decay=0.1 pulls to zero 2 parameters that Penalised already"):
            adapted(penalised()).optimizer(torch.optim.AdamW, lr=0.1, weight_decay=0.1)
        optimizer = adapted(penalised()).optimizer(torch.optim.AdamW, lr=0.1)
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0]

    def test_half_precision(self):
        adaptation = adapted(penalised())
        adaptation.model.to(torch.bfloat16)
        with pytest.raises(ctl.SpecError, match=r"'weight' is torch.bfloat16: steps as small as a pull's are lost"):
            adaptation.optimizer(torch.optim.SGD, lr=0.1)

    @pytest.mark.parametrize(
        ("kind", "message"),
        [
            ("runner_huber", "acts on whole tensors, but 'weight' is sharded over processes. Train with DDP"),
            ("runner_elementwise", None),
        ],
    )
    def test_shards_of_what_is_no_sum_over_elements(self, kind, message, monkeypatch):
        """Norms of a part are not those of the whole."""
        monkeypatch.setattr(param_groups, "sharded", lambda tensor: True)
        adaptation = adapted(penalised(kind))
        if message is None:
            adaptation.optimizer(torch.optim.SGD, lr=0.1)
        else:
            with pytest.raises(ctl.SpecError, match=message):
                adaptation.optimizer(torch.optim.SGD, lr=0.1)

    @pytest.mark.parametrize(
        ("returns", "received"), [("vector", r"shape \(1, 2\)"), ("number", "a float")], ids=["vector", "number"]
    )
    def test_a_value_that_is_no_scalar_tensor(self, returns, received):
        with pytest.raises(ctl.SpecError, match=rf"Penalised: value\(\) must return a scalar.*{received}"):
            step(adapted(penalised("runner_wrong", returns=returns)))

    def test_a_constant_value_has_no_gradient(self):
        assert step(adapted(penalised("runner_wrong", returns="constant"))) == [0.25, -3.0]

    def test_gradients_of_another_shape(self):
        with pytest.raises(ctl.SpecError, match=r"Penalised: gradient\(\) must return one tensor for each parameter"):
            step(adapted(penalised("runner_wrong_gradient"), model=nn.Linear(2, 3)))

    def test_a_strength_that_no_penalty_heeds(self):
        class Chooses(ctl.Strategy):
            kind: Literal["runner_chooses"] = "runner_chooses"

            def apply(self, plan):
                return plan.choose(self.label, "pull", {"weight": {"pull": 0.5}})

        with pytest.raises(ctl.SpecError, match=r"Chooses gives 'weight' a pull of 0\.5, but no penalty of"):
            adapted(Chooses()).optimizer(torch.optim.SGD, lr=0.1)
        assert step(adapted(Chooses(), ctl.L2SP(alpha=0.1))) == pytest.approx([0.25 * 0.95, -3 * 0.95])


class OnAll(Penalised):
    kind: Literal["runner_on_all"] = "runner_on_all"

    def apply(self, plan):
        names = tuple(row.name for row in plan.rows)
        return plan.with_penalty(Penalty.model_validate({"by": self.label, "names": names, **self.penalty}))


del ctl.Strategy.named["runner_on_all"]  # other tests list the kinds


class OwnGradient(Huber):
    kind: Literal["runner_own_gradient"] = "runner_own_gradient"

    def gradient(self, moving):
        return [2 * (item.parameter - item.anchor) for item in moving]


class NoAnchors(Huber):
    kind: Literal["runner_no_anchors"] = "runner_no_anchors"
    anchors: ClassVar[bool] = False


class Wrongly(Huber):
    kind: Literal["runner_wrongly"] = "runner_wrongly"

    def value(self, moving):
        return moving[0].no_such_attribute


class TestFreshParameters:
    """They have no anchor: a penalty that takes one for granted is told so before a weight moves."""

    def model(self):
        return nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 2))

    def adapted(self, kind):
        model = self.model()
        return ctl.adapt(model, nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 3)), [OnAll(penalty={"kind": kind})])

    @pytest.mark.parametrize("kind", ["runner_huber", "runner_elementwise", "runner_own_gradient", "runner_norm"])
    def test_they_are_named(self, kind):
        adaptation = self.adapted(kind)
        before = [parameter.clone() for parameter in adaptation.model.parameters()]
        optimizer = adaptation.optimizer(torch.optim.SGD, lr=0.1)
        with pytest.raises(ctl.SpecError, match=r"OnAll: \['1\.weight', '1\.bias'\] have no anchor: they are fresh"):
            optimizer.step()
        assert all(map(torch.equal, before, adaptation.model.parameters()))
        if kind != "runner_own_gradient":
            with pytest.raises(ctl.SpecError, match=r"\['1\.weight', '1\.bias'\] have no anchor: they are fresh"):
                adaptation.penalty()

    def test_a_penalty_that_asks_for_no_anchors_gets_none(self):
        with pytest.raises(ctl.SpecError, match=r"'0\.weight', .* have no anchor: NoAnchors\.anchors is False"):
            self.adapted("runner_no_anchors").optimizer(torch.optim.SGD, lr=0.1).step()

    def test_another_mistake_keeps_its_own_message(self):
        adaptation = adapted(penalised("runner_wrongly"))
        with pytest.raises(AttributeError, match="no_such_attribute"):
            adaptation.optimizer(torch.optim.SGD, lr=0.1).step()

    def test_an_update_is_told_too(self):
        class Mixes(Update):
            kind: Literal["runner_mixes"] = "runner_mixes"

            def describe(self):
                return "mixes"

            def before(self, step, state):
                for item in step.moving:
                    item.parameter.lerp_(item.anchor, 0.5)

        plan_names = tuple(name for name, _ in self.model().named_parameters())

        class MixesAll(ctl.Strategy):
            kind: Literal["runner_mixes_all"] = "runner_mixes_all"

            def apply(self, plan):
                return plan.with_update(Mixes(by=self.label, names=plan_names))

        adaptation = ctl.adapt(self.model(), nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 3)), [MixesAll()])
        with pytest.raises(ctl.SpecError, match=r"MixesAll: \['1\.weight', '1\.bias'\] have no anchor: they are fresh"):
            adaptation.optimizer(torch.optim.SGD, lr=0.1).step()
