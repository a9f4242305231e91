"""One contract over every way of staying close to the source.

A new member is one row in ``MEMBERS``: a strategy strong enough to be seen, the same at zero strength, and what one
step of SGD must give, computed by the obvious code from the formula in float64.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

import conservtl as ctl
from conservtl.kernels.backend import fused_on
from conservtl.kernels.philox import identity, words
from conservtl.layers import named_parameters
from conservtl.methods.mixout import _draw_mask
from conservtl.testing import models, state_dicts, strategies
from conservtl.testing.law_case import LawCase
from conservtl.testing.laws import LAWS, check_law

RATE = 0.05
X = torch.randn(8, 2, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])


def network() -> nn.Module:
    """Three layers with norms, in float64."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    ).double()


@dataclass(frozen=True)
class Case:
    """What a reference has to go by: plain tensors, nothing of the library.

    Args:
        weights: all parameters before the step.
        start: the same where the model started, which is where the source stands.
        x, y: the batch.
        rate: of plain SGD.
    """

    weights: dict[str, torch.Tensor]
    start: dict[str, torch.Tensor]
    x: torch.Tensor
    y: torch.Tensor
    rate: float

    def outputs(self, weights: dict[str, torch.Tensor]) -> torch.Tensor:
        """Of the plain network with these weights, norms in eval mode."""
        return functional_call(network().eval(), weights, (self.x,))

    def task(self, weights: dict[str, torch.Tensor]) -> torch.Tensor:
        """Mean cross-entropy."""
        return F.cross_entropy(self.outputs(weights), self.y)

    def descend(self, objective: Callable[[dict[str, torch.Tensor]], torch.Tensor]) -> dict[str, torch.Tensor]:
        """Weights after one step of SGD on an objective of all weights."""
        leaves = {name: w.detach().clone().requires_grad_() for name, w in self.weights.items()}
        gradients = torch.autograd.grad(objective(leaves), list(leaves.values()))
        return {name: w.detach() - self.rate * g for (name, w), g in zip(leaves.items(), gradients, strict=True)}

    def pulled(self, weights: dict[str, torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(w, w0) of what L2-SP covers by default: weights of two dimensions or more."""
        return [(w, self.start[name]) for name, w in weights.items() if w.ndim >= 2]


@dataclass(frozen=True)
class Member:
    """A method under the contract.

    Args:
        name: of the test.
        strategy: strong enough to be seen after a step.
        zero: the same at zero strength, which must change nothing at all; None where there is none.
        reference: what one step of SGD gives.
        duplicates: whether a batch given twice over gives the same step (means, not sums, over the batch).
        accumulates: whether two halves give the step of the whole.
        plain_alone: whether a copy of the model, without the adaptation, computes what its weights alone would.
        why: why a law is not asked for.
        optimizer: with which it is seen after two steps.
    """

    name: str
    strategy: ctl.Strategy
    zero: ctl.Strategy | None
    reference: Callable[[Case], dict[str, torch.Tensor]]
    duplicates: bool = True
    accumulates: bool = True
    plain_alone: bool = True
    why: str = ""
    optimizer: type[torch.optim.Optimizer] = torch.optim.SGD

    def __str__(self) -> str:
        return self.name


def plain(case):
    return case.descend(case.task)


def l2_sp(case):
    return case.descend(lambda w: case.task(w) + sum(0.3 / 2 * (a - b).square().sum() for a, b in case.pulled(w)))


def l2_sp_decoupled(case):
    moved = {n: w + case.rate * 3 * (case.start[n] - w) if w.ndim >= 2 else w for n, w in case.weights.items()}
    first = plain(case)
    return {n: moved[n] + (first[n] - case.weights[n]) for n in moved}


def l2_sp_per_parameter(case):
    def objective(w):
        pulled = case.pulled(w)
        count = sum(a.numel() for a, _ in pulled)
        return case.task(w) + sum(30 / count / 2 * (a - b).square().sum() for a, b in pulled)

    return case.descend(objective)


def l2_sp_annealed(case):
    """The first of ten steps from 0.5 to 0."""
    return case.descend(lambda w: case.task(w) + sum(0.5 * 0.3 / 2 * (a - b).square().sum() for a, b in case.pulled(w)))


def kld(case):
    p = case.outputs(case.start).softmax(-1).detach()
    return case.descend(
        lambda w: 0.4 * case.task(w) - 0.6 * (p * case.outputs(w).log_softmax(-1)).sum(-1).mean(),
    )


def lwf(case):
    p = (case.outputs(case.start) / 2).softmax(-1).detach()
    return case.descend(
        lambda w: case.task(w) + 0.7 * 4 * (p * (p.log() - (case.outputs(w) / 2).log_softmax(-1))).sum(-1).mean(),
    )


def entropy(case):
    """0.4 of the entropy and 0.6 of the confusion at temperature 2, 0.7 of both beside the task."""

    def unsure(w):
        p = (case.outputs(w) / 2).softmax(-1)
        shared = p.T @ p
        confused = (1 - shared.diagonal() / shared.sum(1)).mean()
        return 0.4 * -(p * p.log()).sum(-1).mean() + 0.6 * confused

    return case.descend(lambda w: case.task(w) + 0.7 * unsure(w))


def surgical(case):
    return {n: w if n.startswith(("3.", "4.")) else case.weights[n] for n, w in plain(case).items()}


def auto_rgn(case):
    """Layers are a convolution with its norm, twice, and the head."""
    stepped = plain(case)
    ratios = {}
    for layer in (("0.", "1."), ("3.", "4."), ("8.",)):
        own = [n for n in case.weights if n.startswith(layer)]
        g = sum(((case.weights[n] - stepped[n]) / case.rate).square().sum() for n in own).sqrt()
        ratios |= dict.fromkeys(own, g / sum(case.weights[n].square().sum() for n in own).sqrt())
    top = max(ratios.values())
    return {n: w + ratios[n] / top * (stepped[n] - w) for n, w in case.weights.items()}


def toward_source(case, change):
    """A plain step, then ``change`` of d = v - w0 where it is a weight."""
    return {n: case.start[n] + change(v - case.start[n], n) if v.ndim >= 2 else v for n, v in plain(case).items()}


def projection(case):
    return toward_source(case, lambda d, n: d * min(1.0, float(0.1 * case.start[n].norm() / d.norm())))


def mars_rows(case):
    def shrink(d, _):
        rows = d.flatten(1)
        return (rows * (0.2 / rows.abs().sum(1)).clamp(max=1)[:, None]).view_as(d)

    return toward_source(case, shrink)


def selective_decay(case):
    stepped = plain(case)

    def shrink(d, n):
        before = case.weights[n] - case.start[n]
        if (before * (case.weights[n] - stepped[n])).sum() <= 0:  # the step is minus rate × gradient
            return d
        return d * (1 - max(0.0, float((d.norm() - before.norm()) / d.norm())))

    return toward_source(case, shrink)


def l1_sp(case):
    return toward_source(case, lambda d, _: d.sign() * (d.abs() - case.rate * 0.8).clamp(min=0))


def group_lasso_sp(case):
    def shrink(d, _):
        rows = d.flatten(1)
        return (rows * (1 - case.rate * 0.8 * rows.shape[1] ** 0.5 / rows.norm(dim=1)).clamp(min=0)[:, None]).view_as(d)

    return toward_source(case, shrink)


def mixout(case):
    """Its own masks are the only thing it is told: a generator of the step's number, tensor by tensor."""
    generator = torch.Generator().manual_seed(0)
    dropped = round(0.6 * 65536)  # a mask's share in its 16 bits

    def drawn(name, w):
        if not fused_on(w.device):
            return _draw_mask(w, dropped, generator)
        return (words(w.numel(), 0, 0, identity(name)) >> 16 >= dropped).view(w.shape)

    masks = {n: drawn(n, w).double() if w.ndim >= 2 else 1 for n, w in case.weights.items()}
    share = {n: 1 - dropped / 65536 if w.ndim >= 2 else 1 for n, w in case.weights.items()}

    def mixed(n, w):
        return ((1 - masks[n]) * case.start[n] + masks[n] * w - (1 - share[n]) * case.start[n]) / share[n]

    return case.descend(lambda w: case.task({n: mixed(n, one) for n, one in w.items()}))


def _information(case, shares):
    """Diagonal Fisher at the start, label by label and example by example."""
    start = {n: case.start[n] for n in case.weights}
    found = {n: torch.zeros_like(w) for n, w in start.items() if w.ndim >= 2}
    for x, share in zip(case.x, shares, strict=True):
        for label in range(3):
            leaves = {n: w.detach().clone().requires_grad_() for n, w in start.items()}
            outputs = functional_call(network().eval(), leaves, (x[None],))
            gradients = torch.autograd.grad(outputs.log_softmax(-1)[0, label], list(leaves.values()))
            for (n, w), g in zip(leaves.items(), gradients, strict=True):
                if w.ndim >= 2:
                    found[n] += share[label] * g**2 / len(case.x)
    return found


def fisher_sp(case):
    f = _information(case, F.one_hot(case.y, 3))
    return case.descend(lambda w: case.task(w) + sum(3 / 2 * (f[n] * (w[n] - case.start[n]) ** 2).sum() for n in f))


def fisher_sp_decoupled(case):
    f = _information(case, case.outputs(case.start).softmax(-1).detach())
    mean = torch.cat([one.flatten() for one in f.values()]).mean()
    share = {n: (case.rate * 4 * (one / mean).clamp(0.1, 8)).clamp(max=1) for n, one in f.items()}
    first = plain(case)
    return {
        n: w + share.get(n, 0) * (case.start[n] - w) + (first[n] - case.weights[n]) for n, w in case.weights.items()
    }


def _features(case, weights):
    """Of the three layers' last modules, and what the head gets."""
    model = network().eval()
    parts = [(model[:end], {n: w for n, w in weights.items() if int(n[0]) < end}) for end in (2, 5, 8)]
    return [functional_call(part, own, (case.x,)) for part, own in parts]


def delta(case, attention=False):
    theirs = _features(case, case.start)

    def weights(layer):
        """Softmax of the rise of the loss with a channel zeroed."""
        rest = {n.split(".", 1)[1]: w for n, w in case.start.items() if n.startswith("8.")}
        features = theirs[layer]
        after = network().eval()[2 if layer == 0 else 5 : 8]
        own = {n: w for n, w in case.start.items() if layer == 0 and n[0] in "34"}
        losses = []
        for zeroed in range(features.shape[1]):
            some = features.clone()
            some[:, zeroed] = 0
            losses.append(F.cross_entropy(F.linear(functional_call(after, own, (some,)), **rest), case.y))
        return (torch.stack(losses).softmax(0) * len(losses)).view(-1, 1, 1)

    weighed = [weights(layer) if attention else 1 for layer in (0, 1)]

    def objective(w):
        ours = _features(case, w)
        parts = [(weighed[i] * (ours[i] - theirs[i]) ** 2).sum() / (2 * 25 * len(case.x)) for i in (0, 1)]
        return case.task(w) + 0.9 * sum(parts)

    return case.descend(objective)


def ldifs(case):
    theirs = _features(case, case.start)

    def objective(w):
        ours = _features(case, w)
        parts = [
            (a / a.norm(dim=1, keepdim=True) - b / b.norm(dim=1, keepdim=True)).square().sum() / (25 * len(case.x))
            for a, b in zip(ours[:2], theirs[:2], strict=True)
        ]
        return case.task(w) + 0.9 * sum(parts)

    return case.descend(objective)


def bss(case):
    return case.descend(
        lambda w: case.task(w) + 0.5 * torch.linalg.eigvalsh(_features(case, w)[2].T @ _features(case, w)[2])[:2].sum()
    )


def norms_alone(case):
    return {n: w if n[0] in "14" else case.weights[n] for n, w in plain(case).items()}


def norms_on_the_target(case):
    """Statistics at the start, half the source's (8 examples) and half those of the 8; then norms alone."""
    model, x = network().eval(), case.x
    for part in (0, 1, 2, 3, 4):
        if part in (1, 4):
            model[part].running_mean.mul_(0.5).add_(0.5 * x.mean((0, 2, 3)))
            model[part].running_var.mul_(0.5).add_(0.5 * x.transpose(0, 1).flatten(1).var(1))
        own = {n[2:]: w for n, w in case.start.items() if n.startswith(f"{part}.") and n in case.weights}
        x = functional_call(model[part], own, (x,)).detach()
    objective = case.descend(lambda w: F.cross_entropy(functional_call(model, w, (case.x,)), case.y))
    return {n: w if n[0] in "14" else case.weights[n] for n, w in objective.items()}


def norms_of_each_example(case):
    """A quarter of each example's own statistics; the gradient goes through them. The source's are 0 and 1."""

    def outputs(w):
        x = case.x
        for part in ("0", "3"):
            x = F.conv2d(x, w[f"{part}.weight"], w[f"{part}.bias"], padding=1)
            own = {"mean": x.mean((2, 3), keepdim=True), "var": x.var((2, 3), keepdim=True, correction=0)}
            x = (x - own["mean"] / 4) / (3 / 4 + own["var"] / 4 + 1e-5).sqrt()
            norm = str(int(part) + 1)
            x = (x * w[f"{norm}.weight"].view(-1, 1, 1) + w[f"{norm}.bias"].view(-1, 1, 1)).relu()
        return F.linear(x.mean((2, 3)), w["8.weight"], w["8.bias"])

    return case.descend(lambda w: F.cross_entropy(outputs(w), case.y))


def added(case, start, outputs):
    """A step of what was added, which starts at zero, and of nothing else."""
    leaves = {name: torch.zeros(shape, dtype=case.x.dtype, requires_grad=True) for name, shape in start.items()}
    gradients = torch.autograd.grad(F.cross_entropy(outputs(leaves), case.y), list(leaves.values()))
    return case.weights | {name: -case.rate * g for name, g in zip(leaves, gradients, strict=True)}


def lhuc(case):
    def outputs(r):
        x, model = case.x, network().eval()
        for first, last, name in ((0, 3, "1.lhuc"), (3, 6, "4.lhuc"), (6, 9, None)):
            inside = {n: w for n, w in case.weights.items() if first <= int(n[0]) < last}
            parts = nn.Sequential(OrderedDict(list(model.named_children())[first:last]))
            x = functional_call(parts, inside, (x,))
            x = x if name is None else x * (2 / (1 + torch.exp(-r[name]))).view(-1, 1, 1)
        return x

    return added(case, {"1.lhuc": 3, "4.lhuc": 4}, outputs)


def input_transform(case):
    def outputs(leaves):
        weight, bias = leaves.values()
        x = case.x + torch.einsum("ij,njhw->nihw", weight, case.x) + bias.view(-1, 1, 1)
        return functional_call(network().eval(), case.weights, (x,))

    return added(case, {"input_transform.weight": (2, 2), "input_transform.bias": (2,)}, outputs)


def lora(case):
    network()  # the factors are drawn behind it
    names = ("0", "3")
    shapes = {name: (1, *case.weights[f"{name}.weight"].shape[1:]) for name in names}
    factors = {f"{n}.lora_A": nn.init.kaiming_uniform_(case.x.new_empty(shapes[n]), a=5**0.5) for n in names}
    factors |= {f"{n}.lora_B": case.weights[f"{n}.lora_B"] for n in names}
    leaves = {name: factor.requires_grad_() for name, factor in factors.items()}
    base = {name: w for name, w in case.weights.items() if "lora" not in name}
    change = {
        f"{n}.weight": 4 * torch.einsum("or,r...->o...", leaves[f"{n}.lora_B"], leaves[f"{n}.lora_A"]) for n in names
    }
    loss = case.task({name: w + change[name] if name in change else w for name, w in base.items()})
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    stepped = {name: w.detach() - case.rate * g for (name, w), g in zip(leaves.items(), gradients, strict=True)}
    return base | stepped


MEMBERS = [
    Member("l2_sp", ctl.L2SP(alpha=0.3), ctl.L2SP(alpha=0.0, beta=0.0), l2_sp),
    Member(
        "l2_sp decoupled",
        ctl.L2SP(alpha=3, mode="decoupled"),
        ctl.L2SP(alpha=0.0, beta=0.0, mode="decoupled"),
        l2_sp_decoupled,
    ),
    Member(
        "l2_sp per parameter",
        ctl.L2SP(alpha=30, normalize="per_parameter"),
        ctl.L2SP(alpha=0.0, beta=0.0, normalize="per_parameter"),
        l2_sp_per_parameter,
    ),
    Member(
        "l2_sp annealed",
        ctl.L2SP(alpha=0.3, anneal=ctl.Anneal(steps=10, start=0.5)),
        ctl.L2SP(alpha=0.3, beta=0.0, anneal=ctl.Anneal(steps=10, start=0.0)),
        l2_sp_annealed,
    ),
    Member("l2_sp anchors on the CPU", ctl.L2SP(alpha=0.3, anchors="cpu"), None, l2_sp),
    Member("kld", ctl.OutputConservation(rho=0.6), ctl.OutputConservation(rho=0.0), kld),
    Member("lwf", ctl.OutputConservation(weight=0.7), ctl.OutputConservation(weight=0.0), lwf),
    Member(
        "entropy",
        ctl.EntropyMinimisation(weight=0.7, entropy=0.4, temperature=2),
        ctl.EntropyMinimisation(weight=0.0),
        entropy,
        accumulates=False,
        why="classes are confused over the examples of a batch: two halves have other confusions than the whole",
    ),
    Member("lp_ft", ctl.LPFT(epochs=1), None, lambda case: {**case.weights, **_head(plain(case))}),
    Member("surgical", ctl.SurgicalFineTuning(block=-1), None, surgical),
    Member("auto_rgn", ctl.AutoRGN(), ctl.AutoRGN(floor=1.0), auto_rgn),
    Member("projection", ctl.Projection(radius=0.1), ctl.Projection(radius=1e9), projection),
    Member(
        "projection of rows",
        ctl.Projection(radius=0.2, relative=False, by="row", norm="mars"),
        ctl.Projection(radius=1e9, relative=False, by="row", norm="mars"),
        mars_rows,
    ),
    Member(
        "selective_decay",
        ctl.SelectiveDecay(strength=1.0),
        ctl.SelectiveDecay(strength=0.0),
        selective_decay,
        optimizer=torch.optim.AdamW,  # SGD without momentum goes inward by itself where the decay looks
    ),
    Member("l1_sp", ctl.L1SP(alpha=0.8), ctl.L1SP(alpha=0.0, beta=0.0), l1_sp),
    Member("group_lasso_sp", ctl.GroupLassoSP(alpha=0.8), ctl.GroupLassoSP(alpha=0.0, beta=0.0), group_lasso_sp),
    Member("mixout", ctl.Mixout(p=0.6), ctl.Mixout(p=0.0), mixout),
    Member(
        "fisher_sp",
        ctl.FisherSP(alpha=3, normalize="none", data="source"),
        ctl.FisherSP(alpha=0.0, beta=0.0),
        fisher_sp,
    ),
    Member(
        "fisher_sp decoupled, true",
        ctl.FisherSP(alpha=4, mode="decoupled", fisher="true", floor=0.1, clip=8),
        ctl.FisherSP(alpha=0.0, beta=0.0, mode="decoupled"),
        fisher_sp_decoupled,
    ),
    Member("norm_adaptation, norms alone", ctl.NormAdaptation(statistics="source"), None, norms_alone),
    Member("norm_adaptation", ctl.NormAdaptation(prior=8), None, norms_on_the_target),
    Member(
        "norm_adaptation, each example",
        ctl.NormAdaptation(train="all", statistics="instance", prior=3),
        None,
        norms_of_each_example,
        plain_alone=False,
        why="the norms go by each example in every copy of the model: it is part of what was adapted",
    ),
    Member("lhuc", ctl.LHUC(), None, lhuc),
    Member("lora", ctl.LoRA(rank=1, alpha=4), None, lora),
    Member("input_transform", ctl.InputTransform(), None, input_transform),
    Member("delta", ctl.FeatureConservation(alpha=0.9), ctl.FeatureConservation(alpha=0.0), delta),
    Member(
        "delta with attention",
        ctl.FeatureConservation(alpha=0.9, attention=True),
        ctl.FeatureConservation(alpha=0.0, attention=True),
        lambda case: delta(case, attention=True),
    ),
    Member(
        "ldifs",
        ctl.FeatureConservation(alpha=0.9, metric="ldifs"),
        ctl.FeatureConservation(alpha=0.0, metric="ldifs"),
        ldifs,
    ),
    Member(
        "spectral_shrinkage",
        ctl.SpectralShrinkage(eta=0.5, k=2),
        ctl.SpectralShrinkage(eta=0.0),
        bss,
        duplicates=False,
        accumulates=False,
        why="singular values are those of a batch, as in the paper: two halves have others than the whole",
    ),
]
every = pytest.mark.parametrize("member", MEMBERS, ids=str)
weighable = pytest.mark.parametrize("member", [m for m in MEMBERS if m.zero is not None], ids=str)


def _head(weights):
    return {name: w for name, w in weights.items() if name.startswith("8.")}


def adapted(*chosen, displaced=True):
    """An adaptation measured and ready, whose weights have moved away from the source."""
    model = network()
    adaptation = ctl.adapt(model, copy.deepcopy(model), chosen)
    ready(adaptation)
    if displaced:
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            start = adaptation.start
            for name, p in sorted(named_parameters(model).items()):
                if name in start and name in adaptation.plan.trained:  # the start of the others is their value
                    p.add_(torch.randn(p.shape, dtype=p.dtype, generator=generator), alpha=0.1)
    return adaptation


def ready(adaptation):
    """Measure what the plan asks for."""
    adaptation.measure([(X, Y)])
    adaptation.measure([(X, Y)], on="source")


def train(model):
    """Training mode, but for the norms: a step must not depend on how a batch is cut."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


def objective(adaptation, batch):
    outputs = adaptation.model(batch[0])
    return adaptation.loss(F.cross_entropy(outputs, batch[1]), outputs, batch[0])


def step(adaptation, optimizer):
    train(adaptation.model)
    objective(adaptation, (X, Y)).backward()
    optimizer.step()
    optimizer.zero_grad()


def weights(adaptation):
    return {name: p.detach().clone() for name, p in named_parameters(adaptation.model).items()}


def alike(ours, theirs, **tolerance):
    assert ours.keys() == theirs.keys()
    for name, w in ours.items():
        torch.testing.assert_close(w, theirs[name], msg=lambda m, name=name: f"{name}: {m}", **tolerance)


def exactly(ours, theirs):
    assert [name for name, w in ours.items() if not torch.equal(w, theirs[name])] == []


@every
def test_a_step_is_what_the_formula_says(member):
    """Value and gradient, against code that knows only the formula."""
    adaptation = adapted(member.strategy)
    start = {name: t.double() for name, t in adaptation.start.items()}
    before = weights(adaptation)
    own = {name: before[name] for name in before if name in start}
    expected = member.reference(Case(own, start, X, Y, RATE))
    step(adaptation, adaptation.optimizer(torch.optim.SGD, lr=RATE))
    alike({name: w for name, w in weights(adaptation).items() if name in expected}, expected, rtol=1e-6, atol=1e-9)
    assert any(not torch.equal(before[name], w) for name, w in weights(adaptation).items())


@every
def test_it_is_seen(member):
    """The strength used here does something: else the other laws would say nothing."""
    ours, theirs = adapted(member.strategy), adapted()
    for adaptation in (ours, theirs):
        optimizer = adaptation.optimizer(member.optimizer, lr=RATE)
        for _ in range(2):
            step(adaptation, optimizer)
    assert any(not torch.allclose(w, weights(theirs).get(name, w), rtol=1e-4) for name, w in weights(ours).items()) or (
        weights(ours).keys() != weights(theirs).keys()
    )


@weighable
@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.AdamW])
def test_zero_strength_is_plain_fine_tuning(member, cls):
    ours, theirs = adapted(member.zero), adapted()
    for adaptation in (ours, theirs):
        optimizer = adaptation.optimizer(cls, lr=RATE, weight_decay=0.0)
        for _ in range(3):
            step(adaptation, optimizer)
    alike(weights(ours), weights(theirs), rtol=1e-12, atol=1e-14)


def test_who_is_excepted_from_a_law_says_why():
    assert all(
        bool(member.why) != (member.duplicates and member.accumulates and member.plain_alone) for member in MEMBERS
    )


def law_case(member, optimizer=torch.optim.SGD, **options):
    """The member in a loop with norms in eval mode, its weights moved away from the source."""
    return LawCase(
        label=member.name,
        make=lambda: adapted(member.strategy),
        rebuild=lambda: ctl.adapt(network(), copy.deepcopy(network()), [member.strategy]),
        objective=objective,
        batch=(X, Y),
        parts=list(zip(X.chunk(2), Y.chunk(2), strict=True)),
        doubled=(torch.cat([X, X]), torch.cat([Y, Y])),
        optimizer=optimizer,
        options={"lr": RATE, **options},
    )


EXCEPTIONS = {"doubled batch": "duplicates", "accumulation": "accumulates"}


def kept_by(*laws):
    """Each of some laws with the members that are not excepted from it."""
    return [(law, member) for law in laws for member in MEMBERS if getattr(member, EXCEPTIONS.get(law, "name"))]


@pytest.mark.parametrize(("law", "member"), kept_by(*LAWS), ids=str)
def test_it_keeps_the_laws_of_a_step(law, member):
    """Those that a user's own strategy is held to, with SGD and its momentum."""
    check_law(law, law_case(member, momentum=0.9))


@pytest.mark.parametrize(("law", "member"), kept_by("accumulation", "resuming", "deep copy"), ids=str)
def test_it_keeps_them_with_adamw(law, member):
    check_law(law, law_case(member, torch.optim.AdamW))


@pytest.mark.parametrize("member", [m for m in MEMBERS if m.plain_alone], ids=str)
def test_a_copy_of_the_model_alone_trains_plainly(member):
    """It keeps nothing of the adaptation: no hook listens, nothing is mixed in."""
    adaptation = adapted(member.strategy)
    adaptation.optimizer(torch.optim.SGD, lr=RATE)
    model = copy.deepcopy(adaptation.model)
    train(model)
    model(X).square().mean().backward()
    expected = {name: p.grad.clone() for name, p in named_parameters(model).items() if p.grad is not None}
    bare = network()
    own = {name: t for name, t in model.state_dict().items() if name in bare.state_dict()}
    bare.load_state_dict(own)
    train(bare)
    bare(X).square().mean().backward()
    theirs = {name: p.grad for name, p in named_parameters(bare).items()}
    alike(expected, {name: theirs.get(name, g) for name, g in expected.items()})


@every
def test_a_second_model_does_not_remember_the_first(member):
    first = adapted(member.strategy)
    step(first, first.optimizer(torch.optim.SGD, lr=2 * RATE))
    second, alone = adapted(member.strategy), adapted(copy.deepcopy(member.strategy))
    for adaptation in (second, alone):
        step(adaptation, adaptation.optimizer(torch.optim.SGD, lr=RATE))
    exactly(weights(second), weights(alone))


@every
def test_composes_with_transfer_and_rates(member):
    """What layer transfer freezes stands still bit for bit; what remains trains."""
    held = ctl.LayerTransfer(side="input", layers=1)
    adaptation = adapted(member.strategy, held, ctl.DiscriminativeLR(decay=0.5))
    before = weights(adaptation)
    optimizer = adaptation.optimizer(torch.optim.AdamW, lr=RATE)
    for phase in range(len(adaptation.plan.phases)):
        adaptation.start_phase(phase)
        step(adaptation, optimizer)
        step(adaptation, optimizer)
    frozen = {row.name for row in adaptation.plan.rows if row.frozen}
    exactly({n: w for n, w in weights(adaptation).items() if n in frozen}, before)
    assert any(not torch.equal(w, before[n]) for n, w in weights(adaptation).items())


@every
def test_what_is_frozen_costs_nothing(member):
    """No anchor is placed for a frozen parameter, and a loss without gradient asks the source nothing."""
    adaptation = adapted(member.strategy, ctl.LayerTransfer(side="input", layers=1))
    step(adaptation, adaptation.optimizer(torch.optim.SGD, lr=RATE))
    assert not {name for _, name in adaptation.bound.anchors.placed} & adaptation.frozen
    loss = torch.tensor(1.0)
    assert adaptation.loss(loss, None, None if not adaptation.plan.terms else X) is loss


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_stacks_of_strategies_train(data):
    """Whatever is drawn together trains three steps, stays finite, and leaves what is frozen as it was."""
    model, x = data.draw(models())
    weights_of_source = data.draw(state_dicts(model))
    chosen = data.draw(strategies(model, x, max_size=4, measured=True))
    try:
        adaptation = ctl.adapt(model, weights_of_source, chosen, example=x)
        adaptation.measure([(x, torch.tensor([0, 1, 2, 0]))])
        adaptation.measure([(x, torch.tensor([0, 1, 2, 0]))], on="source")
    except ctl.InputError:
        return
    if not adaptation.plan.trained:
        return
    optimizer = adaptation.optimizer(torch.optim.SGD, lr=1e-3)
    for phase in range(len(adaptation.plan.phases)):
        adaptation.start_phase(phase)
        before = {n: w for n, w in weights(adaptation).items() if n in adaptation.frozen}
        for _ in range(3):
            adaptation.model.train()
            outputs = adaptation.model(x)
            loss = F.cross_entropy(outputs, torch.tensor([0, 1, 2, 0]))
            total = adaptation.loss(loss, outputs, x)
            if total.requires_grad:
                total.backward()
            optimizer.step()
            optimizer.zero_grad()
        exactly(before, {n: w for n, w in weights(adaptation).items() if n in before})
    assert all(torch.isfinite(w).all() for w in weights(adaptation).values())
