"""Optimizers around optimizers: the pull acts in the inner step, once; what cannot be served is refused."""

from __future__ import annotations

import copy
from collections import defaultdict
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import conservtl as ctl

ALPHA, LR, RHO = 0.5, 0.1, 0.05
X = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1, 2, 0, 1, 2])


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimisation (Foret et al., 2021): the gradient at w + rho g/|g| moves w."""

    def __init__(self, params, base_optimizer=torch.optim.SGD, rho=RHO, **options):
        super().__init__(params, {"rho": rho, **options})
        self.base_optimizer = base_optimizer(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self):
        members = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in members]).norm()
        for p in members:
            self.state[p]["before"] = p.clone()
            p.add_(p.grad * (self.defaults["rho"] / norm))

    @torch.no_grad()
    def second_step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if "before" in self.state[p]:
                    p.copy_(self.state[p].pop("before"))
        self.base_optimizer.step()

    def step(self, closure):
        closure = torch.enable_grad()(closure)
        loss = closure()
        self.first_step()
        closure()
        self.second_step()
        return loss


class SAMAlone(SAM):
    """Without an optimizer inside."""

    def __init__(self, params, rho=RHO, **options):
        torch.optim.Optimizer.__init__(self, params, {"rho": rho, **options})

    @torch.no_grad()
    def second_step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.copy_(self.state[p]["before"] - group["lr"] * p.grad)


class Lookahead(torch.optim.Optimizer):
    """Lookahead (Zhang et al., 2019): every k steps, slow weights go a part of the way to the fast ones."""

    def __init__(self, inner, k=2, alpha=0.5):
        super().__init__(inner.param_groups, {})
        self.inner, self.k, self.alpha, self.count = inner, k, alpha, 0
        self.param_groups, self.defaults, self.state = inner.param_groups, inner.defaults, defaultdict(dict)
        self.slow = [[p.detach().clone() for p in group["params"]] for group in self.param_groups]

    @torch.no_grad()
    def step(self, closure=None):
        loss = self.inner.step(closure)
        self.count += 1
        if self.count % self.k == 0:
            for group, slow in zip(self.param_groups, self.slow, strict=True):
                for p, s in zip(group["params"], slow, strict=True):
                    p.copy_(s.lerp_(p, self.alpha))
        return loss


def lookahead(params, **options):
    return Lookahead(torch.optim.SGD(params, **options))


class Copying(SAM):
    """Gives the inner optimizer copies of its groups."""

    def __init__(self, params, **options):
        torch.optim.Optimizer.__init__(self, params, options)
        self.base_optimizer = torch.optim.SGD([dict(group) for group in self.param_groups], **options)


class Flat(Lookahead):
    """Drops the groups' rates."""

    def __init__(self, params, lr):
        super().__init__(torch.optim.SGD([p for group in params for _, p in group["params"]], lr=lr))


class Merging(Lookahead):
    """Puts all into one group, which has one rate and one weight decay."""

    def __init__(self, params, lr, weight_decay):
        members = [p for group in params for _, p in group["params"]]
        super().__init__(torch.optim.SGD(members, lr=lr, weight_decay=weight_decay))


class Twice(Lookahead):
    def step(self, closure=None):
        self.inner.step(closure)
        return self.inner.step()


class Averaging(Lookahead):
    """Steps from averages that it keeps, and leaves others in the model."""

    @torch.no_grad()
    def step(self, closure=None):
        for group, slow in zip(self.param_groups, self.slow, strict=True):
            for p, s in zip(group["params"], slow, strict=True):
                p.copy_(s)
        loss = self.inner.step(closure)
        for group, slow in zip(self.param_groups, self.slow, strict=True):
            for p, s in zip(group["params"], slow, strict=True):
                s.copy_(p)
                p.mul_(0.9)
        return loss


class Two(Lookahead):
    def __init__(self, params, lr):
        super().__init__(torch.optim.SGD(params, lr=lr))
        self.other = [torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=lr)]


class Idle(Lookahead):
    def step(self, closure=None):
        return closure() if closure else None


def network(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def adapted(*strategies):
    return ctl.adapt(network(0), network(1), strategies or [ctl.L2SP(alpha=ALPHA, on="all")])


def loss_of(model):
    return F.cross_entropy(model(X), Y)


def gradients(model, start=None):
    """Of the task's loss; with the pull if the starting point is given."""
    found = torch.autograd.grad(loss_of(model), list(model.parameters()))
    if start is None:
        return found
    return [g + ALPHA * (p.detach() - s) for g, p, s in zip(found, model.parameters(), start, strict=True)]


@torch.no_grad()
def shift(model, by):
    for p, d in zip(model.parameters(), by, strict=True):
        p.add_(d)


def assert_same(model, reference):
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("how", ["parts", "closure"])
@pytest.mark.parametrize("cls", [SAM, partial(SAM, base_optimizer=torch.optim.SGD)])
def test_sam(how, cls):
    """w <- w - lr (g(w + rho g/|g|) + alpha (w - w0)): the pull is of w, and perturbs nothing."""
    adaptation = adapted()
    model, reference = adaptation.model, copy.deepcopy(adaptation.model)
    start = [p.detach().clone() for p in reference.parameters()]
    optimizer = adaptation.optimizer(cls, lr=LR)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    for _ in range(4):
        if how == "closure":
            optimizer.step(closure)
        else:
            closure()
            optimizer.first_step()
            closure()
            optimizer.second_step()
        first = gradients(reference)
        norm = torch.stack([g.norm() for g in first]).norm()
        ahead = copy.deepcopy(reference)
        shift(ahead, [RHO * g / norm for g in first])
        pulls = [ALPHA * (p.detach() - s) for p, s in zip(reference.parameters(), start, strict=True)]
        shift(reference, [-LR * (g + pull) for g, pull in zip(gradients(ahead), pulls, strict=True)])
        assert_same(model, reference)


def _lookaheads():
    yield "reference", lookahead
    try:
        from timm.optim.lookahead import Lookahead as Timms
    except ImportError:
        return
    yield "timm", lambda params, **options: Timms(torch.optim.SGD(params, **options), alpha=0.5, k=2)


@pytest.mark.parametrize(
    ("whose", "make"), list(_lookaheads()), ids=lambda value: value if isinstance(value, str) else ""
)
@pytest.mark.parametrize("outside", [False, True])
def test_lookahead(whose, make, outside):
    """Made inside adaptation.optimizer, or around what it gives."""
    adaptation = adapted()
    model, reference = adaptation.model, copy.deepcopy(adaptation.model)
    start = [p.detach().clone() for p in reference.parameters()]
    if outside:
        optimizer = Lookahead(adaptation.optimizer(torch.optim.SGD, lr=LR))
        slow = start
    else:
        optimizer = adaptation.optimizer(make, lr=LR)
        slow = None if whose == "timm" else start  # timm's slow weights begin after the first k steps
    for step in range(1, 7):
        model.zero_grad()  # the optimizer's own fails in timm's, which leaves out the constructor of its base class
        loss_of(model).backward()
        optimizer.step()
        shift(reference, [-LR * g for g in gradients(reference, start)])
        if step % 2 == 0:
            fast = [p.detach().clone() for p in reference.parameters()]
            slow = fast if slow is None else [(s + f) / 2 for s, f in zip(slow, fast, strict=True)]
            shift(reference, [s - f for s, f in zip(slow, fast, strict=True)])
        assert_same(model, reference)


def test_rates_phases_and_frozen_parts_reach_the_inner_step():
    stages = [ctl.Stage(train=["2"], epochs=1), ctl.Stage(train=["*"])]
    adaptation = adapted(ctl.GradualUnfreezing(phases=stages), ctl.DiscriminativeLR(groups={"0": 0.1}))
    reference = copy.deepcopy(adaptation.model)
    optimizer = adaptation.optimizer(SAM, lr=LR)
    scheduler = adaptation.scheduler(torch.optim.lr_scheduler.ConstantLR, factor=0.5, total_iters=9)
    rates = {"0": 0.1 * LR / 2, "2": LR / 2}
    for group in optimizer.base_optimizer.param_groups:
        assert all(group["lr"] == pytest.approx(rates[name[0]]) for name in group["param_names"])

    def step():
        for part in (optimizer.first_step, optimizer.second_step):
            optimizer.zero_grad()
            loss_of(adaptation.model).backward()
            part()

    step()
    assert torch.equal(adaptation.model[0].weight, reference[0].weight)
    assert not torch.equal(adaptation.model[2].weight, reference[2].weight)
    adaptation.start_phase(1)
    step()
    assert not torch.equal(adaptation.model[0].weight, reference[0].weight)
    assert set(scheduler.get_last_lr()) == {group["lr"] for group in optimizer.param_groups}


def test_schedule_free():
    """The gradient and the pull are of the same weights y: as with a term in the loss."""
    schedulefree = pytest.importorskip("schedulefree")
    adaptation = adapted()
    reference = copy.deepcopy(adaptation.model)
    start = [p.detach().clone() for p in reference.parameters()]
    ours = adaptation.optimizer(schedulefree.AdamWScheduleFree, lr=LR)
    theirs = schedulefree.AdamWScheduleFree(reference.parameters(), lr=LR)
    for model, optimizer, pulls in ((adaptation.model, ours, False), (reference, theirs, True)):
        optimizer.train()
        for _ in range(5):
            optimizer.zero_grad()
            term = sum((p - s).square().sum() for p, s in zip(model.parameters(), start, strict=True))
            (loss_of(model) + (ALPHA / 2 * term if pulls else 0)).backward()
            optimizer.step()
        optimizer.eval()
    assert_same(adaptation.model, reference)
    for strategy in (ctl.L2SP(mode="decoupled"), ctl.Projection(), ctl.Mixout(p=0.1)):
        with pytest.raises(ctl.SpecError, match="AdamWScheduleFree keeps averaged weights"):
            adapted(strategy).optimizer(schedulefree.AdamWScheduleFree, lr=LR)
    with pytest.raises(ctl.SpecError, match="steps from other weights"):
        adapted().optimizer(lambda params, lr: schedulefree.ScheduleFreeWrapper(torch.optim.SGD(params, lr=lr)), lr=LR)


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (SAMAlone, "SAMAlone: its first_step and second_step call no step.*wraps a base optimizer"),
        (Copying, r"Copying: its inner optimizer has copies of its groups.*param_groups = base_optimizer.param_groups"),
        (Flat, "Flat: its groups must keep the rates they are given; '0.weight' has 0.1 instead of 0.01"),
        (lambda params, lr: Twice(torch.optim.SGD(params, lr=lr)), "steps 2 times"),
        (lambda params, lr: Averaging(torch.optim.SGD(params, lr=lr)), "steps from other weights"),
        (lambda params, lr: Idle(torch.optim.SGD(params, lr=lr)), r"must call its inner optimizer's step\(\)"),
        (Two, "Two holds 2 optimizers"),
        (lambda params, lr: [params, lr], "gives a list, which is no torch optimizer"),
        (lambda params, lr: torch.optim.SGD(params[:1], lr=lr), "must hold every trained parameter; '0.bias'"),
    ],
)
def test_what_cannot_be_served_is_refused_when_the_optimizer_is_made(cls, message):
    adaptation = adapted(ctl.L2SP(alpha=ALPHA), ctl.DiscriminativeLR(groups={"0": 0.1}))
    before = copy.deepcopy(adaptation.model.state_dict())
    with pytest.raises(ctl.SpecError, match=message):
        adaptation.optimizer(cls, lr=LR)
    assert all(torch.equal(tensor, before[name]) for name, tensor in adaptation.model.state_dict().items())


def test_groups_are_kept():
    adaptation = adapted(ctl.DiscriminativeLR(decay=1.0))
    with pytest.raises(ctl.SpecError, match="Merging: it must keep the 2 groups it is given; it has 1"):
        adaptation.optimizer(Merging, lr=LR, weight_decay=0.1)


def test_mixout_between_two_parts_of_a_step_is_refused():
    with pytest.raises(ctl.SpecError, match=r"SAM moves weights between two forward passes.*Mixout"):
        adapted(ctl.Mixout(p=0.1)).optimizer(SAM, lr=LR)


def test_one_parameter_is_enough_for_steps_on_trial():
    model, source = (torch.nn.Linear(3, 2, bias=False) for _ in range(2))
    adaptation = ctl.adapt(model, source, [ctl.L2SP(alpha=ALPHA)])
    assert adaptation.optimizer(lookahead, lr=LR).param_groups[0]["params"] == [model.weight]


def test_an_optimizer_with_one_of_train_and_eval_keeps_no_second_weights():
    """Schedule-free ones have both, because they put another version of the weights into the model."""

    class Noted(torch.optim.SGD):
        def train(self):
            pass

    for strategy in (ctl.L2SP(mode="decoupled"), ctl.Projection()):
        assert adapted(strategy).optimizer(Noted, lr=LR)


def test_a_scaler_unscales_for_the_outer_optimizer_once():
    adaptation = adapted()
    plain = copy.deepcopy(adaptation)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer, other = adaptation.optimizer(lookahead, lr=LR), plain.optimizer(lookahead, lr=LR)
    for _ in range(3):
        scaler.scale(loss_of(adaptation.model)).backward()
        adaptation.pull(scaler)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        loss_of(plain.model).backward()
        other.step()
        other.zero_grad()
    assert_same(adaptation.model, plain.model)
